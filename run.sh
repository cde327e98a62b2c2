#!/bin/sh
# Caption the rows of a test file, as the contest's platform calls it:
#
#     sh run.sh INPUT OUTPUT WEIGHTS [PYTHON] [--FLAG …]
#
# INPUT    rows of `id \t base64 image`
# OUTPUT   gets one line `id \t caption` per row
# WEIGHTS  a model folder, or its parent folder
# PYTHON   an interpreter, or the folder of an environment (with bin/python in it); by default the first of python,
#          python3 and .venv/bin/python next to this file that has Paddle
# --FLAG   and everything after it is passed to predict.py: --shard 1/4, --max_chars 200, … (see predict.py --help)
#
# This file is in a submission folder (with predict.py under src/) or in the project's top folder (next to predict.py).
# All three relative paths start from the caller's folder if INPUT and WEIGHTS exist there, else from the folder of
# predict.py if both exist there.
#
# The exit status is that of predict.py: 0 when the job is complete, 2 for bad usage with one line that says what to change.

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

usage='usage: sh run.sh INPUT OUTPUT WEIGHTS [PYTHON] [--FLAG ...]'
case ${1-} in
    -h | --help)
        printf '%s\n' "$usage"
        exit 0
        ;;
esac
[ $# -ge 3 ] || fail "$usage"
for argument in "$1" "$2" "$3"; do
    [ -n "$argument" ] || fail "an empty argument; $usage"
done
wanted_python=''
case ${4-} in
    --*) ;;
    *)
        wanted_python=${4-}
        case ${5---} in
            --*) ;;
            *) fail "$usage" ;;
        esac
        ;;
esac

caller=$(pwd) || exit 2
# CDPATH would make cd print, and go somewhere else.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 2
if [ -f "$here/src/predict.py" ]; then
    source_folder=$here/src
elif [ -f "$here/predict.py" ]; then
    source_folder=$here
else
    fail "no predict.py in $here/src or in $here"
fi

# The folder that relative paths start from.
exists() {
    case $2 in
        /*) [ -e "$2" ] ;;
        *) [ -e "$1/$2" ] ;;
    esac
}
base=''
lacks="input $1"
for folder in "$caller" "$source_folder"; do
    exists "$folder" "$1" || continue
    lacks="weights $3 where input $1 exists"
    exists "$folder" "$3" || continue
    base=$folder
    break
done
looked=$caller
[ "$caller" = "$source_folder" ] || looked="$caller and $source_folder"
[ -n "$base" ] || fail "no $lacks: looked in $looked"

absolute() {
    case $1 in
        /*) printf '%s' "$1" ;;
        *) printf '%s/%s' "$base" "$1" ;;
    esac
}
input=$(absolute "$1")
output=$(absolute "$2")
weights=$(absolute "$3")

# Names of the modules that an interpreter lacks, in one line; nothing is imported, so this takes no time.
missing_modules() {
    "$1" -c '
import importlib.util
needed = ("paddle", "paddlenlp", "numpy", "PIL", "tiktoken", "tqdm")
print(" ".join(name for name in needed if importlib.util.find_spec(name) is None))'
}

if [ -n "$wanted_python" ]; then
    python=$wanted_python
    case $wanted_python in
        /*) ;;
        *)
            # A name alone may also be a command on the PATH.
            if [ -e "$caller/$wanted_python" ]; then
                python=$caller/$wanted_python
            elif [ -e "$source_folder/$wanted_python" ]; then
                python=$source_folder/$wanted_python
            fi
            ;;
    esac
    if [ -d "$python" ]; then
        [ -x "$python/bin/python" ] || fail "no bin/python in the environment folder $python"
        python=$python/bin/python
    fi
    command -v -- "$python" >/dev/null 2>&1 || fail "no Python interpreter $wanted_python"
    missing=$(missing_modules "$python") || fail "$python does not run as Python 3"
else
    python=''
    missing='paddle'
    for candidate in python python3 "$here/.venv/bin/python" "$source_folder/.venv/bin/python"; do
        command -v -- "$candidate" >/dev/null 2>&1 || continue
        lacks=$(missing_modules "$candidate" 2>/dev/null) || continue
        case " $lacks " in
            *' paddle '*) ;;
            *)
                python=$candidate
                missing=$lacks
                break
                ;;
        esac
    done
    [ -n "$python" ] || fail 'no Python with Paddle found; install paddlepaddle or paddlepaddle-gpu, or give a Python as 4th argument'
fi
if [ -n "$missing" ]; then
    fail "$python lacks $missing: run \"$python\" -m pip install -r \"$here/requirements.txt\" (Paddle itself comes first: see README.md)"
fi

shift 3
case ${1---} in
    --*) ;;
    *) shift ;;
esac
exec "$python" "$source_folder/predict.py" "$input" "$output" "$weights" "$@"
