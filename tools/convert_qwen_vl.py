"""Import a public Qwen-VL or Qwen-VL-Chat checkpoint: `python tools/convert_qwen_vl.py SRC DST [--dtype
D]`.
"""

from __future__ import annotations

import argparse
import os
import sys

# Run as a script, the project's top folder is not on the path yet.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.utils import cli  # noqa: E402


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Convert a public Qwen-VL or Qwen-VL-Chat folder (safetensors or .bin, sharded or not) to a "
        "MGen-VL model folder, which the other scripts take. Works one tensor at a time and never executes anything in "
        "a file.",
    )
    parser.add_argument(
        "source", type=cli.path, metavar="SRC", help="folder with config.json, the weights and qwen.tiktoken"
    )
    parser.add_argument("target", type=cli.output_folder, metavar="DST", help="folder to write")
    cli.add_weights_options(parser, "DST", format="pdparams")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()

    from paddlemix.checkpoint.convert import convert_qwen_vl
    from paddlemix.models.mgen_vl.configuration import MGenConfig
    from paddlemix.models.mgen_vl.parameters import parameter_shapes
    from paddlemix.utils.log import logger

    def shapes_of(values):
        return parameter_shapes(MGenConfig.from_values(values, args.source))

    result = convert_qwen_vl(args.source, args.target, shapes_of=shapes_of, **cli.weights_options(args))
    if "mgen.tiktoken" not in result.files:
        logger.warning(f"{args.source} has no qwen.tiktoken: put one into {args.target} as mgen.tiktoken")
    print(f"{result.tensors} tensors written to {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
