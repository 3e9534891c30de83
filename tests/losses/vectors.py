"""Logits of which the published codes' terms were computed by hand."""

import numpy as np

Z1 = np.array([[2, 0.5, -1], [0.1, 0.2, 0.3]], np.float32)
Z2 = np.array([[1, 1.5, -0.5], [0, -0.4, 0.9]], np.float32)
Z3 = np.array([[0.2, -0.3, 0.4], [1.2, 0.7, -0.6]], np.float32)
Z4 = np.array([[0.7, 0.1, -0.3], [-0.2, 0, 0.8]], np.float32)
LABELS = np.array([0, 2])
