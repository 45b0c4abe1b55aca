"""Slow, obvious versions of each formula, loop by loop, each with its source.

They take and return Python floats or float64 tensors and share nothing with the package.
"""

import math

import torch


def softmax(logits, temperature=1.0):
    """exp(z_k / T) / sum_j exp(z_j / T), one row; Hinton et al. 2015, equation 1."""
    top = max(float(z) for z in logits)
    powers = [torch.exp((z - top) / temperature) for z in logits]
    return [p / sum(powers) for p in powers]


def kl_divergence(student, teacher, student_temperature=1.0, teacher_temperature=1.0):
    """sum_k p_k (log p_k - log q_k) per row; Hinton et al. 2015, section 2."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        q, p = softmax(s, student_temperature), softmax(t, teacher_temperature)
        values.append(
            sum(pk * (torch.log(pk) - torch.log(qk)) for pk, qk in zip(p, q, strict=True))
        )
    return torch.stack(values)


def soft_target(student, teachers, weights, temperature, scale=True):
    """T^2 times the batch mean of KL(sum_m w_m p_m || q), w (M,) or (M, B); You et al. 2017."""
    total = 0.0
    for b in range(len(student)):
        w = [weights[m][b] if weights.dim() == 2 else weights[m] for m in range(len(teachers))]
        rows = [softmax(t[b], temperature) for t in teachers]
        p = [sum(w[m] * rows[m][k] for m in range(len(teachers))) for k in range(len(student[b]))]
        q = softmax(student[b], temperature)
        total = total + sum(
            pk * (torch.log(pk) - torch.log(qk)) for pk, qk in zip(p, q, strict=True)
        )
    return total / len(student) * (temperature**2 if scale else 1.0)


def logit_mean_probabilities(teachers, weights, temperature):
    """softmax(sum_m w_m z_m / T), weights (M,): the geometric mean; METHODS of averaging logits."""
    rows = []
    for b in range(len(teachers[0])):
        mean = [
            sum(weights[m] * teachers[m][b][k] for m in range(len(teachers)))
            for k in range(len(teachers[0][b]))
        ]
        rows.append(torch.stack(softmax(mean, temperature)))
    return torch.stack(rows)


def logit_mse(student, teacher):
    """(1/K) sum_k (s_k - t_k)^2 per row; Ba & Caruana 2014, equation 1 with the mean over K."""
    return torch.stack(
        [
            sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)
            for s, t in zip(student, teacher, strict=True)
        ]
    )


def cross_entropy(logits, labels):
    """-log p_label per row, 0 where the label is -1."""
    return torch.stack(
        [
            z.sum() * 0 if y < 0 else -torch.log(softmax(z)[y])
            for z, y in zip(logits, labels.tolist(), strict=True)
        ]
    )


def hint_distance(student, teacher, power):
    """Mean over elements of |s - t|^p per sample; Romero et al. 2015, equation 3."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        pairs = list(zip(s.flatten(), t.flatten(), strict=True))
        values.append(sum(abs(a - b) ** power for a, b in pairs) / len(pairs))
    return torch.stack(values)


def attention_distance(student, teacher):
    """Mean over positions of (Q_s - Q_t)^2; Zagoruyko & Komodakis 2017, equation 2.

    Q = v / |v|_2 with v_i = mean over channels of F_ci^2, one resolution.
    """

    def normalised(features):
        channels = [c.flatten() for c in features]
        v = [sum(c[i] ** 2 for c in channels) / len(channels) for i in range(len(channels[0]))]
        norm = torch.sqrt(sum(x**2 for x in v))
        return [x / norm for x in v]

    values = []
    for s, t in zip(student, teacher, strict=True):
        a, b = normalised(s), normalised(t)
        values.append(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))
    return torch.stack(values)


def calibration_error(probabilities, labels, bins=15):
    """sum_b |B_b| / n |accuracy(B_b) - confidence(B_b)|; Guo et al. 2017, equation 3."""
    total, n = 0.0, len(labels)
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [
            (float(p.max()), int(p.argmax()) == int(y))
            for p, y in zip(probabilities, labels, strict=True)
            if low < float(p.max()) <= high
        ]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(r for _, r in inside) / len(inside)
            total += len(inside) / n * abs(accuracy - confidence)
    return total


def sigmoid_ramp_up(progress):
    """exp(-5 (1 - t)^2); Laine & Aila 2017, section 2.1."""
    return math.exp(-5 * (1 - progress) ** 2)
