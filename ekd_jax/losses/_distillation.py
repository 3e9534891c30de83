"""Learning from soft targets.

A label says which class is right; a teacher's probabilities also say which
wrong classes are nearly right. Dividing logits by a temperature T > 1 before
the softmax lifts those small probabilities to where they matter. The student
is then pulled towards the teacher by KL(teacher || student): wherever the
teacher puts probability, the student pays for having little.

Two details carry this file. Softening divides the gradient by T^2 (one T from
each softmax), so the loss is multiplied by T^2 and its weight against other
losses stays valid at any T. And everything stays in log space: a confident
teacher's smallest probability underflows to 0 in float32, where p * log(p)
is 0 * -inf.
"""

import jax
import jax.numpy as jnp
import optax

from ekd_jax.losses import _checks


def distillation_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array,
  stop_teacher_gradient: bool = True,
) -> jax.Array:
  r"""Computes T^2 times the KL divergence of the student from the teacher.

  .. math::
    \ell = T^2 \sum_k p_k \log \frac{p_k}{q_k}, \quad
    p = \mathrm{softmax}(z_{teacher} / T), \quad
    q = \mathrm{softmax}(z_{student} / T)

  Zero exactly where the two distributions agree. As T grows and for logits of
  mean zero the student's gradient tends to (z_student - z_teacher) / K, which
  no longer depends on T.

  Args:
    student_logits: Unnormalised log-probabilities with shape [..., K]. Finite,
      of any floating-point type.
    teacher_logits: The same for the teacher, with shape [..., K].
    temperature: T, a finite number above 0 shared by the batch; 1 compares the
      plain softmax outputs. May be a traced scalar, whose range is then not
      checked.
    stop_teacher_gradient: Whether the teacher is a constant target (the
      default). False also pulls the teacher towards the student.

  Returns:
    The loss of each example, non-negative up to rounding, float32, with shape
    [...].

  Raises:
    AssertionError: If the logits are not floating-point arrays of one shape
      with K >= 1, or `temperature` is not a single number.
    ValueError: If `temperature` is a Python number that is not finite and
      above 0.

  References:
    Hinton et al, `Distilling the Knowledge in a Neural Network
    <https://arxiv.org/abs/1503.02531>`_, 2015: soft targets, the factor T^2
    and the limit of large T.

    Walawalkar et al, `Online Ensemble Model Compression using Knowledge
    Distillation <https://arxiv.org/abs/2011.07449>`_, 2020, Eq. 6, which is
    printed without T^2.

  Example:
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> student = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
    >>> teacher = jnp.array([[1.0, 0.5, 0.0], [0.1, 0.2, 0.3]])
    >>> loss = losses.distillation_loss(student, teacher, temperature=2.0)
    >>> print(loss.round(4))
    [0.3046 0.    ]
  """
  _checks.assert_logits("student_logits", student_logits)
  _checks.assert_logits("teacher_logits", teacher_logits)
  _checks.assert_same_shape(
    "student_logits",
    student_logits,
    "teacher_logits",
    teacher_logits,
    "[..., K]",
  )
  _checks.check_temperature(temperature)
  if stop_teacher_gradient:
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
  temperature = jnp.asarray(temperature, jnp.float32)
  # Low-precision logits are cast before the softmax, not after: bfloat16 log-
  # probabilities are off by more than the differences that are compared here.
  student = jnp.asarray(student_logits, jnp.float32) / temperature
  teacher = jnp.asarray(teacher_logits, jnp.float32) / temperature
  return temperature**2 * optax.losses.kl_divergence_with_log_targets(
    jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
  )
