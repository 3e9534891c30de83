"""Optimizers of torch and TensorFlow, from their documentation, in NumPy."""

import numpy as np


class TorchSGD:
  """torch.optim.SGD(nesterov=True) of one parameter; dampening is 0.

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


class TensorFlowRMSProp:
  """tf.compat.v1.train.RMSPropOptimizer, from its documentation.

  g <- g + weight_decay p;  s <- .9 s + .1 g^2, which starts at 1;
  m <- momentum m + lr g / sqrt(s + epsilon);  p <- p - m.
  """

  def __init__(self, momentum, weight_decay, epsilon):
    self.momentum = momentum
    self.weight_decay = weight_decay
    self.epsilon = epsilon
    self.squares = 1.0
    self.buffer = 0.0

  def step(self, parameter, gradient, learning_rate):
    """Returns the parameter after one step."""
    parameter = np.asarray(parameter, np.float64)
    gradient = gradient + self.weight_decay * parameter
    self.squares = 0.9 * self.squares + 0.1 * gradient**2
    scaled = gradient / np.sqrt(self.squares + self.epsilon)
    self.buffer = self.momentum * self.buffer + learning_rate * scaled
    return parameter - self.buffer
