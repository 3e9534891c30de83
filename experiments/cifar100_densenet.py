r"""A family of compressed DenseNets on CIFAR-100, from one run.

    python experiments/cifar100_densenet.py --data-dir DATA \
        --ratios 0.5,0.9,0.95

trains DenseNet-BC 12/100 and students with 50, 90 and 95 % of its parameters
removed. Table 3 of "Online Ensemble Model Compression using Knowledge
Distillation" (ECCV 2020; widths 1, .8, .6, .4, .2; mean of five runs; best test
epoch; batch statistics in evaluation), top-1 %, alone -> together:

    75.79 71.97 70.23 67.13 45.41 -> 75.96 72.39 70.09 68.14 49.12

Run time: work for an accelerator; on two CPU cores a step of 64 images takes
3.4 seconds, after two minutes of compiling. Of the full recipe nothing has been
run; 200 such steps on 6,400 images gave 9.15 8.44 6.29 5.03, ensemble 8.54.
"""

from ekd_jax import cli
from ekd_jax.config import Config

if __name__ == "__main__":
  cli.main(
    Config(
      dataset="cifar100",
      network="densenet",
      variant="12/100",
      ratios=(0.5, 0.9, 0.95),
    ),
    "Trains a family of compressed DenseNets on CIFAR-100 in one run.",
  )
