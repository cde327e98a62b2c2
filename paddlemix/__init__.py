"""MGen-VL ad captioning on PaddlePaddle and PaddleNLP, in the manner of PaddleMIX.

Importing the package only prepares the process: the CPU's thread defaults, which Paddle reads once, when it is itself
imported, and what the libraries may lack (utils/surroundings.py). So: import paddlemix before paddle. Nothing heavy is
loaded here.
"""

from paddlemix.utils import surroundings
from paddlemix.utils.runtime import set_cpu_defaults

__version__ = "0.1.0"

surroundings.prepare()
set_cpu_defaults()
