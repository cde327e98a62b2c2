"""MGen-VL ad captioning on PaddlePaddle and PaddleNLP, in the manner of PaddleMIX.

Importing the package only sets the CPU's thread defaults, which Paddle reads once, when it is itself
imported. So: import paddlemix before paddle. Nothing heavy is loaded here.
"""

from paddlemix.utils.runtime import set_cpu_defaults

__version__ = "0.1.0"

set_cpu_defaults()
