"""What layers cost, by arithmetic, and channels at a width.

A plan compares hundreds of widths; building and tracing each of them would
take minutes. MACs are those of convolutions and dense layers for one image,
taps on the zero padding included, as the field counts them.
"""

from ekd_jax.compression import Cost

NOTHING = Cost(params=0, macs=0)


def convolution(
  inputs: int, outputs: int, size: int, area: int, groups: int = 1
) -> Cost:
  """A convolution without bias that makes maps of `area` pixels."""
  weights = size * size * inputs * outputs // groups
  return Cost(params=weights, macs=weights * area)


def biased_convolution(inputs: int, outputs: int, size: int, area: int) -> Cost:
  """A convolution with bias."""
  plain = convolution(inputs, outputs, size, area)
  return plain + Cost(params=outputs, macs=0)


def norm(channels: int) -> Cost:
  """Batch norm's scale and bias."""
  return Cost(params=2 * channels, macs=0)


def dense(inputs: int, outputs: int) -> Cost:
  """A linear layer with bias."""
  weights = inputs * outputs
  return Cost(params=weights + outputs, macs=weights)


def truncated(channels: int, width: float) -> int:
  """int(channels * width), as published, but for the product's rounding.

  0.29 * 100 is 28.999999999999996 and means 29.
  """
  return int(channels * width + 1e-9)
