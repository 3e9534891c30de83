"""A family of compressed ResNeXts on CIFAR-10, from one run.

    python experiments/cifar10_resnext.py --data-dir DATA --widths 1,.8,.6,.4,.2

trains ResNeXt-50 32x4d, with the stem of large images (7x7, stride 2, max
pooling) on 32 pixels, as the paper did. Table 2 of "Online Ensemble Model
Compression using Knowledge Distillation" (ECCV 2020; mean of five runs; best
test epoch; batch statistics in evaluation), top-1 %, alone -> together:

    ResNeXt-50    95.78 95.56 95.27 95.09 94.97 -> 96.03 95.95 95.84 95.69 95.47

Run time: work for an accelerator. Nothing of it has been trained.
"""

from ekd_jax import cli
from ekd_jax.config import Config

if __name__ == "__main__":
  cli.main(
    Config(dataset="cifar10", network="imagenet_resnet", variant="resnext50"),
    "Trains a family of compressed ResNeXts on CIFAR-10 in one run.",
  )
