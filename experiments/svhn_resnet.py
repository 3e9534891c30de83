"""A family of compressed ResNets on SVHN, from one run.

    python experiments/svhn_resnet.py --data-dir DATA --ratios 0.5,0.75,0.97

trains ResNet-110 for 50 epochs. Table 5 of "Online Ensemble Model Compression
using Knowledge Distillation" (ECCV 2020; widths 1, .8, .6, .4, .2; mean of five
runs; best test epoch; batch statistics in evaluation), top-1 %, alone ->
together:

    ResNet-20     96.64 95.03 94.45 92.12 89.58 -> 97.10 96.92 95.53 92.03 92.67
    ResNet-110    97.64 96.61 95.83 93.73 91.77 -> 97.87 97.84 96.81 95.90 93.78

Run time: work for an accelerator; for ResNet-20 with five members, 0.6 seconds
a step of 128 images on two CPU cores, five hours for the 50 epochs.
Nothing has been run on SVHN itself.
"""

from ekd_jax import cli
from ekd_jax.config import Config

if __name__ == "__main__":
  cli.main(
    Config(dataset="svhn", depth=110),
    "Trains a family of compressed ResNets on SVHN in one run.",
  )
