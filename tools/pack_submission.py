"""Make the folder that is sent to the platform: `python tools/pack_submission.py --weights DIR`. See --help."""

from __future__ import annotations

import argparse
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Run as a script, the project's top folder is not on the path yet.
sys.path.insert(0, ROOT)

from paddlemix.utils import cli  # noqa: E402

MORE = """\
OUT contains requirements.txt, run.sh, src/ (predict.py and paddlemix/) and weights/<model folder>/. The weights are
hard links where the file system supports them, so they take no additional space.

The platform takes an archive of OUT. There are two ways, both uncompressed, since weights hardly compress:
  --zip            everything in OUT.zip
  --split_weights  OUT.zip without the weights files, and these in OUT.weights/ with their SHA-256 sums, to download one
                   at a time where a single download of 20 GB would fail. Then unzip, check, put them back, zip again:
                     unzip submission.zip
                     (cd submission.weights && sha256sum -c SHA256SUMS)
                     mv submission.weights/*model* submission/weights/*/
                     zip -0 -r submission.zip submission

Then: python tools/check_submission.py OUT
"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Build the submission folder, and its archive, for the contest's platform.",
        epilog=MORE,
    )
    parser.add_argument(
        "--weights", type=cli.path, required=True, help="a merged model folder, or its parent folder"
    )
    parser.add_argument(
        "--out", type=cli.output_folder, default="submission", help="folder to create (default: %(default)s)"
    )
    parser.add_argument(
        "--requirements",
        type=cli.path,
        default=os.path.join(ROOT, "requirements", "submission.txt"),
        help="packages to install on the platform (default: requirements/submission.txt, for Paddle 2.6)",
    )
    archive = parser.add_mutually_exclusive_group()
    archive.add_argument("--zip", action="store_true", help="also write OUT.zip")
    archive.add_argument("--split_weights", action="store_true", help="write OUT.zip and OUT.weights/, see below")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing submission and its archive")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()

    from paddlemix.contest import pack
    from paddlemix.inference.source import find_model_folder
    from paddlemix.utils.errors import UserError
    from paddlemix.utils.outputs import check_file, check_kind
    from paddlemix.utils.texts import counted

    out = os.path.abspath(args.out)
    archive, beside = out + ".zip", out + ".weights"
    wanted = ([archive] if args.zip or args.split_weights else []) + ([beside] if args.split_weights else [])
    find_model_folder(args.weights)
    for path in wanted:
        if os.path.exists(path) and not args.overwrite:
            raise UserError(f"{path} is there already: give another --out, or --overwrite to replace it")
    if wanted:
        check_file(archive, plain=True)
        check_kind(archive, "a zip archive")
    if args.split_weights:
        pack.check_beside(beside)
    packed = pack.pack_submission(ROOT, args.weights, out, args.requirements, args.overwrite)
    print(
        f"{out}: {packed.model} in {counted(len(packed.large), 'weights file')} "
        f"({'hard linked' if packed.linked else 'copied'}), {packed.nbytes / 1e9:,.3g} GB in all"
    )
    large = pack.split_weights(packed, beside) if args.split_weights else set()
    if args.split_weights:
        print(f"{beside}: {', '.join(packed.large)}, {pack.SUMS_NAME}")
    if wanted:
        print(f"{archive}: {pack.write_zip(out, archive, large) / 1e9:,.3g} GB")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
