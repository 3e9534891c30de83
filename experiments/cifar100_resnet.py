"""A family of compressed ResNets on CIFAR-100, from one run.

    python experiments/cifar100_resnet.py --data-dir DATA --ratios 0.5,0.75,0.97

trains ResNet-110 and students with 50, 75 and 97 % of its parameters removed,
with the recipe of "Online Ensemble Model Compression using Knowledge
Distillation" (ECCV 2020). Its Table 3 (widths 1, .8, .6, .4, .2; mean of five
runs; best test epoch; batch statistics in evaluation), top-1 %, alone ->
together:

    ResNet-32     70.21 67.87 64.17 61.85 39.12 -> 70.97 68.24 65.67 61.17 42.17
    ResNet-110    72.64 69.53 67.12 64.58 42.26 -> 72.81 70.14 67.73 65.08 46.76

Run time: --quick takes about a minute on two CPU cores. ResNet-20 with
five members takes about 0.6 seconds a step of 128 images there; the full
recipe is work for an accelerator.
"""

from ekd_jax import cli
from ekd_jax.config import Config

if __name__ == "__main__":
  cli.main(
    Config(dataset="cifar100", depth=110),
    "Trains a family of compressed ResNets on CIFAR-100 in one run.",
  )
