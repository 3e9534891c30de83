"""torch.optim.SGD(nesterov=True), from its documentation, in NumPy."""

import numpy as np


class TorchSGD:
  """Keeps one parameter's momentum buffer; dampening is 0.

  g <- g + weight_decay p;  b <- momentum b + g (b <- g at the first step);
  g <- g + momentum b;  p <- p - lr g.
  """

  def __init__(self, momentum, weight_decay):
    self.momentum = momentum
    self.weight_decay = weight_decay
    self.buffer = None

  def step(self, parameter, gradient, learning_rate):
    """Returns the parameter after one step."""
    parameter = np.asarray(parameter, np.float64)
    gradient = gradient + self.weight_decay * parameter
    if self.buffer is None:
      self.buffer = np.array(gradient)
    else:
      self.buffer = self.momentum * self.buffer + gradient
    gradient = gradient + self.momentum * self.buffer
    return parameter - learning_rate * gradient
