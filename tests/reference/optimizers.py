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


class TorchAdam:
  """torch.optim.Adam of one parameter, betas .9 and .999, epsilon 1e-8.

  g <- g + weight_decay p;  m <- .9 m + .1 g;  v <- .999 v + .001 g^2;
  p <- p - lr (m / (1 - .9^t)) / (sqrt(v / (1 - .999^t)) + 1e-8).
  """

  def __init__(self, weight_decay):
    self.weight_decay = weight_decay
    self.mean = self.square = 0.0
    self.count = 0

  def step(self, parameter, gradient, learning_rate):
    """Returns the parameter after one step."""
    parameter = np.asarray(parameter, np.float64)
    gradient = gradient + self.weight_decay * parameter
    self.count += 1
    self.mean = 0.9 * self.mean + 0.1 * gradient
    self.square = 0.999 * self.square + 0.001 * gradient**2
    mean = self.mean / (1 - 0.9**self.count)
    square = self.square / (1 - 0.999**self.count)
    return parameter - learning_rate * mean / (np.sqrt(square) + 1e-8)
