"""The losses once more, from the equations, in float64 NumPy.

Written for reading, not for speed: no accelerator library, no shared code with
the package, and a log-sum-exp of its own. Where a derivative is short enough
to work out on paper it is here as well, so that gradients are held against
something that is not automatic differentiation.
"""

import numpy as np


def log_softmax(logits):
  """log(exp(z_k) / sum_j exp(z_j)) over the last axis."""
  z = np.asarray(logits, np.float64)
  largest = z.max(axis=-1, keepdims=True)
  log_sum = np.log(np.exp(z - largest).sum(axis=-1, keepdims=True)) + largest
  return z - log_sum


def softmax(logits):
  return np.exp(log_softmax(logits))


def cross_entropy(logits, labels):
  """-log p_y: [N, K], [N] -> [N]."""
  log_probs = log_softmax(logits)
  return np.array([-log_probs[n, y] for n, y in enumerate(labels)])


def ensemble_logits(logits, weights=None):
  """sum_i w_i z_i / sum_i w_i."""
  weights = [1.0] * len(logits) if weights is None else weights
  total = sum(
    w * np.asarray(z, np.float64) for w, z in zip(weights, logits, strict=True)
  )
  return total / sum(weights)


def distillation_loss(student_logits, teacher_logits, temperature):
  """T^2 sum_k p_k (log p_k - log q_k): [..., K] twice -> [...]."""
  log_p = log_softmax(np.asarray(teacher_logits, np.float64) / temperature)
  log_q = log_softmax(np.asarray(student_logits, np.float64) / temperature)
  return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def distillation_student_gradient(student_logits, teacher_logits, temperature):
  """d distillation_loss / d student_logits = T (q - p)."""
  p = softmax(np.asarray(teacher_logits, np.float64) / temperature)
  q = softmax(np.asarray(student_logits, np.float64) / temperature)
  return temperature * (q - p)


def distillation_teacher_gradient(student_logits, teacher_logits, temperature):
  """d distillation_loss / d teacher_logits = T p (log(p / q) - KL)."""
  log_p = log_softmax(np.asarray(teacher_logits, np.float64) / temperature)
  log_q = log_softmax(np.asarray(student_logits, np.float64) / temperature)
  p, log_ratio = np.exp(log_p), log_p - log_q
  kl = (p * log_ratio).sum(axis=-1, keepdims=True)
  return temperature * p * (log_ratio - kl)


def feature_loss(student_features, teacher_features):
  """Mean of (s - t)^2 over one example: [N, ..., C] twice -> [N]."""
  s = np.asarray(student_features, np.float64)
  t = np.asarray(teacher_features, np.float64)
  return np.array([np.mean((a - b) ** 2) for a, b in zip(s, t, strict=True)])


def feature_student_gradient(student_features, teacher_features):
  """d sum(feature_loss) / d student_features = 2 (s - t) / M."""
  s = np.asarray(student_features, np.float64)
  t = np.asarray(teacher_features, np.float64)
  return 2 * (s - t) / s[0].size


def mutual_learning_loss(logits, temperature):
  """T^2 / (S - 1) sum_{j != i} KL(p_j || p_i) for each member i."""
  losses = []
  for i, z_i in enumerate(logits):
    total = np.zeros(np.shape(z_i)[:-1])
    for j, z_j in enumerate(logits):
      if j != i:
        total += distillation_loss(z_i, z_j, temperature)
    losses.append(total / max(len(logits) - 1, 1))
  return losses


def ekd_loss(
  logits,
  labels,
  student_features,
  teacher_features,
  temperature,
  label_weight,
  feature_weight,
  distill_weight,
):
  """The three terms, and their weighted sum over members and blocks."""
  ensemble = ensemble_logits(logits)
  label = [cross_entropy(z, labels).mean() for z in logits]
  distill = [distillation_loss(z, ensemble, temperature).mean() for z in logits]
  feature = [
    [
      feature_loss(s, t).mean()
      for s, t in zip(features, teacher_features, strict=True)
    ]
    for features in student_features
  ]
  loss = (
    label_weight * np.sum(label)
    + feature_weight * np.sum(feature)
    + distill_weight * np.sum(distill)
  )
  return loss, {"label": label, "feature": feature, "distill": distill}


def ekd_logit_gradients(
  logits, labels, temperature, label_weight, distill_weight
):
  """d ekd_loss / d z_i, the ensemble being a constant.

  (w_l (softmax(z_i) - onehot(y)) + w_d T (q_i - p_E)) / N
  """
  ensemble = ensemble_logits(logits)
  gradients = []
  for z in logits:
    onehot = np.eye(np.shape(z)[-1])[np.asarray(labels)]
    label = softmax(z) - onehot
    distill = distillation_student_gradient(z, ensemble, temperature)
    gradients.append(
      (label_weight * label + distill_weight * distill) / len(labels)
    )
  return gradients


def ramp_up(epoch, length):
  """exp(-5 (1 - e / L)^2), e between 0 and L."""
  if length == 0:
    return 1.0
  done = min(max(epoch, 0), length) / length
  return np.exp(-5 * (1 - done) ** 2)


def ffl_loss(logits, fused, labels, temperature, weight):
  """Labels for all; fused teaches each, their mean teaches fused."""

  def distill(student, teacher):
    return distillation_loss(student, teacher, temperature).mean()

  mean = np.mean([np.asarray(z, np.float64) for z in logits], axis=0)
  terms = {
    "label": [cross_entropy(z, labels).mean() for z in logits],
    "fused_label": cross_entropy(fused, labels).mean(),
    "distill": [distill(z, fused) for z in logits],
    "fused_distill": distill(fused, mean),
  }
  loss = np.sum(terms["label"]) + terms["fused_label"]
  loss += weight * (np.sum(terms["distill"]) + terms["fused_distill"])
  return loss, terms


def pcl_loss(logits, ensemble, mean_teachers, labels, temperature, weight):
  """Labels, the ensemble, and the mean of the others' mean teachers."""

  def distill(student, teacher):
    return distillation_loss(student, teacher, temperature).mean()

  terms = {
    "label": [cross_entropy(z, labels).mean() for z in logits],
    "ensemble_label": cross_entropy(ensemble, labels).mean(),
    "ensemble": [distill(z, ensemble) for z in logits],
    "mean_teacher": [
      np.mean([distill(z, t) for j, t in enumerate(mean_teachers) if j != i])
      for i, z in enumerate(logits)
    ],
  }
  loss = np.sum(terms["label"]) + terms["ensemble_label"]
  loss += weight * (np.sum(terms["ensemble"]) + np.sum(terms["mean_teacher"]))
  return loss, terms


def attention_map(features):
  """Means over channels of squares: [N, H, W, C] -> [N, H, W]."""
  return (np.asarray(features, np.float64) ** 2).mean(-1)


def _unit(row):
  return row / max(np.sqrt((row**2).sum()), 1e-12)


def normalized_feature_loss(student, teacher):
  """Mean of (s / |s| - t / |t|)^2 over one example: [N, ...] -> [N]."""
  pairs = zip(
    np.asarray(student, np.float64),
    np.asarray(teacher, np.float64),
    strict=True,
  )
  return np.array([((_unit(s) - _unit(t)) ** 2).mean() for s, t in pairs])


def attention_loss(student, teacher):
  return normalized_feature_loss(attention_map(student), attention_map(teacher))


def _turned_around(attention, normalized):
  """Place by place: less than the threshold, at it, and above it."""
  flat = attention.ravel()
  length = 1.0 if normalized else np.sqrt((flat**2).sum())
  unit = _unit(flat)
  threshold = sorted(unit)[len(unit) // 3 - 1]
  target = np.array(
    [
      length - y if y > threshold else y if y < threshold else length / 2
      for y in unit
    ]
  )
  return unit, target, length


def diversity_loss(student, peer, normalized=False):
  """[N, H, W, C] twice -> [N]."""
  losses = []
  for s, p in zip(attention_map(student), attention_map(peer), strict=True):
    _, target, _ = _turned_around(p, normalized)
    losses.append(((_unit(s.ravel()) - target) ** 2).mean())
  return np.array(losses)


def shifted_features(features, normalized=False):
  """[N, H, W, C] -> the same shape."""
  found = []
  for maps, attention in zip(
    np.asarray(features, np.float64), attention_map(features), strict=True
  ):
    unit, target, length = _turned_around(attention, normalized)
    shift = (target - unit) * length / maps.shape[-1]
    found.append(maps + shift.reshape(attention.shape)[..., None])
  return np.array(found)
