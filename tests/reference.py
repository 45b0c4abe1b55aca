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


def decoupled_kl(student, teacher, labels, temperature, alpha, beta):
    """alpha KL(b_t || b_s) + beta KL(rest_t || rest_s) per row; Zhao et al. 2022, equation 7."""
    values = []
    for s, t, y in zip(student, teacher, labels.tolist(), strict=True):
        q, p = softmax(s, temperature), softmax(t, temperature)
        others = [k for k in range(len(s)) if k != y]
        q_not, p_not = sum(q[k] for k in others), sum(p[k] for k in others)
        target = p[y] * torch.log(p[y] / q[y]) + p_not * torch.log(p_not / q_not)
        rest = sum(p[k] / p_not * torch.log((p[k] / p_not) / (q[k] / q_not)) for k in others)
        values.append(alpha * target + beta * rest)
    return torch.stack(values)


def standardize(logits):
    """(z - mean) / (std + 1e-7), std with K - 1; Sun et al. 2024, algorithm 1."""
    return torch.stack([(z - z.mean()) / (z.std() + 1e-7) for z in logits])


def subset_kl(student, teacher, classes, temperature):
    """KL(p || softmax of the student's logits of those classes) per row; UHC's CE variant."""
    return kl_divergence(student[:, classes], teacher, temperature, temperature)


def unit_distance(student, teacher):
    """sum |s / |s|_2 - t / |t|_2| per sample; Park & Kwak 2019, equation 1."""
    return torch.stack(
        [
            (s / s.pow(2).sum().sqrt() - t / t.pow(2).sum().sqrt()).abs().sum()
            for s, t in zip(student, teacher, strict=True)
        ]
    )


def selectivity_distance(student, teacher):
    """MMD^2 of unit channel maps under (a . b)^2 per sample; Huang & Wang 2017, equation 7."""

    def mean_kernel(a, b):
        return sum((x * y).sum() ** 2 for x in a for y in b) / (len(a) * len(b))

    values = []
    for s, t in zip(student, teacher, strict=True):
        s = [c.flatten() / c.pow(2).sum().sqrt() for c in s]
        t = [c.flatten() / c.pow(2).sum().sqrt() for c in t]
        values.append(mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t))
    return torch.stack(values)


def similarity_distance(student, teacher):
    """|| G_s - G_t ||_F^2 / B^2, rows of Q Q^T of unit length; Tung & Mori 2019."""

    def gram(x):
        rows = []
        for a in x:
            row = torch.stack([(a * b).sum() for b in x])
            rows.append(row / row.pow(2).sum().sqrt())
        return rows

    pairs = zip(gram(student), gram(teacher), strict=True)
    return sum((a - b).pow(2).sum() for a, b in pairs) / len(student) ** 2


def matrix_log(matrix, terms=4000):
    """log A = log c - sum_n (I - A / c)^n / n, c the largest row sum; no eigenvalues."""
    c = matrix.abs().sum(1).max()
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    power, total = eye, torch.zeros_like(matrix)
    for n in range(1, terms):
        power = power @ (eye - matrix / c)
        total = total - power / n
    return total + torch.log(c) * eye


def log_euclidean_distance(student, teacher, epsilon):
    """|| log(A_s + e I) - log(A_t + e I) ||_F^2 / B^2; Wu et al. 2019, equation 5."""

    def similarities(x):
        x = [torch.relu(a) for a in x]
        x = [a / a.pow(2).sum().sqrt() for a in x]
        matrix = torch.stack([torch.stack([(a * b).sum() for b in x]) for a in x])
        return matrix + epsilon * torch.eye(len(x), dtype=matrix.dtype)

    difference = matrix_log(similarities(student)) - matrix_log(similarities(teacher))
    return difference.pow(2).sum() / len(student) ** 2


def huber(a, b):
    """0.5 d^2 below 1, |d| - 0.5 above."""
    d = (a - b).abs()
    return 0.5 * d**2 if float(d) < 1 else d - 0.5


def relational_distance(student, teacher):
    """Mean Huber distance of d_ij / mean(d > 0) over all pairs; Park et al. 2019, equation 6."""

    def distances(x):
        d = [[(a - b).pow(2).sum().sqrt() if a is not b else a.sum() * 0 for b in x] for a in x]
        positive = [v for row in d for v in row if float(v) > 0]
        mean = sum(positive) / len(positive) if positive else 1.0
        return [[v / mean for v in row] for row in d]

    s, t, n = distances(list(student)), distances(list(teacher)), len(student)
    return sum(huber(s[i][j], t[i][j]) for i in range(n) for j in range(n)) / n**2


def relational_angle(student, teacher):
    """Mean Huber distance of cos(i j k) over all triples; Park et al. 2019, equation 8."""

    def unit(v):
        norm = v.pow(2).sum()
        return v / norm.sqrt() if float(norm) > 0 else v * 0

    def cosine(x, i, j, k):
        return (unit(x[i] - x[j]) * unit(x[k] - x[j])).sum()

    n = len(student)
    triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    return sum(huber(cosine(student, *ijk), cosine(teacher, *ijk)) for ijk in triples) / n**3


def probabilistic_distance(student, teacher, epsilon=1e-7):
    """Mean over pairs of p log(p / q) of row-normalised (cos + 1) / 2; Passalis & Tefas 2018."""

    def rows(x):
        units = [a / a.pow(2).sum().sqrt() for a in x]
        kernel = [[((a * b).sum() + 1) / 2 + epsilon for b in units] for a in units]
        return [[v / sum(row) for v in row] for row in kernel]

    q, p, n = rows(student), rows(teacher), len(student)
    return sum(p[i][j] * torch.log(p[i][j] / q[i][j]) for i in range(n) for j in range(n)) / n**2


def confidence_weights(teachers, labels):
    """(1 - e^CE_m / sum e^CE_j) / (M - 1), (M, B); Zhang et al. 2022 (CA-MKD), equation 1."""
    m = len(teachers)
    losses = [cross_entropy(t, labels) for t in teachers]
    if m == 1:
        return torch.ones(1, len(labels), dtype=losses[0].dtype)
    shares = [softmax([loss[b] for loss in losses]) for b in range(len(labels))]
    return torch.tensor([[(1 - float(row[i])) / (m - 1) for row in shares] for i in range(m)])


def entropy_weights(teachers):
    """(1 - H_m / sum H_j) / (M - 1), (M, B); EBKD, scaled to sum to 1."""
    m, batch = len(teachers), len(teachers[0])
    h = [[-sum(float(p) * math.log(float(p)) for p in softmax(z)) for z in t] for t in teachers]
    if m == 1:
        return torch.ones(1, batch)
    return torch.tensor(
        [
            [(1 - h[i][b] / sum(h[j][b] for j in range(m))) / (m - 1) for b in range(batch)]
            for i in range(m)
        ]
    )


def soft_target_gradient(student, teacher, temperature):
    """d/dz of T^2 KL(p_t || p_s) of the batch mean, averaged over samples, by autograd."""
    z = student.clone().requires_grad_()
    loss = temperature**2 * kl_divergence(z, teacher, temperature, temperature).mean()
    (gradient,) = torch.autograd.grad(loss, z)
    return gradient.sum(0)


def min_norm_weights(gradients, c_max, steps=20000):
    """min || sum a_m g_m ||, sum a = 1, 0 <= a <= C by pairwise exchange of mass (SMO)."""
    m = len(gradients)
    gram = [[float((a * b).sum()) for b in gradients] for a in gradients]
    a = [1 / m] * m
    for _ in range(steps):
        slope = [sum(gram[i][j] * a[j] for j in range(m)) for i in range(m)]
        up = [i for i in range(m) if a[i] < c_max - 1e-15]
        down = [i for i in range(m) if a[i] > 1e-15]
        if not up or not down:
            break
        i, j = min(up, key=lambda k: slope[k]), max(down, key=lambda k: slope[k])
        curve = gram[i][i] + gram[j][j] - 2 * gram[i][j]
        if slope[j] - slope[i] < 1e-14 or curve <= 0:
            break
        step = min((slope[j] - slope[i]) / curve, c_max - a[i], a[j])
        a[i], a[j] = a[i] + step, a[j] - step
    return a


def mmd(source, target):
    """Biased MMD^2 with exp(-d^2 / median d^2); Gretton et al. 2012, equation 5."""
    both = [*source, *target]
    squared = [float((a - b).pow(2).sum()) for a in both for b in both]
    width = sorted(squared)[(len(squared) - 1) // 2]

    def mean(xs, ys):
        return sum(math.exp(-float((x - y).pow(2).sum()) / width) for x in xs for y in ys) / (
            len(xs) * len(ys)
        )

    return mean(source, source) + mean(target, target) - 2 * mean(source, target)


def jensen_shannon(p, q):
    """(KL(p || m) + KL(q || m)) / 2, m the mean; Lin 1991."""
    total = 0.0
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        m = (a + b) / 2
        total += (a * math.log(a / m) if a else 0.0) + (b * math.log(b / m) if b else 0.0)
    return total / 2


def renyi(p, q, alpha):
    """log sum p^a q^(1 - a) / (a - 1); Renyi 1961."""
    pairs = zip(p.tolist(), q.tolist(), strict=True)
    return math.log(sum(a**alpha * b ** (1 - alpha) for a, b in pairs)) / (alpha - 1)


def self_paced_weight(student, expert, threshold):
    """1 below b A_m, then falling to 0 at A_m; Xiang et al. 2020 (LFME), equation 5."""
    if student < threshold * expert:
        return 1.0
    return max(0.0, (expert - student) / (expert * (1 - threshold))) if expert else 0.0


def dml_loss(k, logits):
    """1 / (K - 1) sum_l KL(p_l || p_k), mean over the batch; Zhang et al. 2018, equation 8."""
    others = [z for j, z in enumerate(logits) if j != k]
    return sum(kl_divergence(logits[k], z.detach()).mean() for z in others) / len(others)


def min_logits(logits, labels):
    """min_k (z_kj - z_ky), row by row; Guo et al. 2020 (KDCL), equation 7."""
    return torch.tensor(
        [
            [min(float(z[b][j] - z[b][y]) for z in logits) for j in range(len(logits[0][b]))]
            for b, y in enumerate(labels.tolist())
        ]
    )


def attention_targets(left, right, features, logits):
    """z_a* = sum_b softmax_b(<L h_a, E h_b>) z_b per sample; Chen et al. 2020, equations 3 to 5."""
    targets = []
    for a in range(len(logits)):
        rows = []
        for s in range(len(logits[0])):
            scores = [
                (left @ features[a][s]) @ (right @ features[b][s]) for b in range(len(logits))
            ]
            shares = softmax(scores)
            rows.append(sum(shares[b] * logits[b][s] for b in range(len(logits))))
        targets.append(torch.stack(rows))
    return targets


def modulating_weight(logits, contents, gamma):
    """(1 - share of its class in the memory) (1 - p)^gamma, a row; Liu et al. 2024, equation 3."""
    shares = softmax(logits)
    label = max(range(len(shares)), key=lambda k: float(shares[k]))
    same = sum(1 for other in contents if other == label)
    rare = 1 - same / len(contents) if contents else 1.0
    return rare * (1 - shares[label]) ** gamma


def priority_probabilities(priorities, alpha, epsilon):
    """(|d_i| + e)^a / sum_j (|d_j| + e)^a, floats; Schaul et al. 2016, equation 1."""
    powers = [(abs(d) + epsilon) ** alpha for d in priorities]
    return [p / sum(powers) for p in powers]


def importance_weights(probabilities, count, beta):
    """1 / (N P_i)^b, floats; Schaul et al. 2016, section 3.4."""
    return [1 / (count * p) ** beta for p in probabilities]


def channel_statistics(values):
    """Mean and biased variance of each channel of (B, C, ...); Ioffe & Szegedy 2015, algorithm 1.

    Sums are in float64.
    """
    means, variances = [], []
    for c in range(values.shape[1]):
        numbers = list(values[:, c].double().flatten())
        mean = sum(numbers) / len(numbers)
        means.append(mean)
        variances.append(sum((x - mean) ** 2 for x in numbers) / len(numbers))
    return torch.stack(means), torch.stack(variances)


def statistics_gap(layers):
    """sum_l ||m_l - rm_l|| + ||v_l - rv_l||, plain norms; Yin et al. 2020, equation 4."""
    total = 0.0
    for mean, variance, wanted_mean, wanted_variance in layers:
        for found, wanted in ((mean, wanted_mean), (variance, wanted_variance)):
            total = total + sum((a - b) ** 2 for a, b in zip(found, wanted, strict=True)) ** 0.5
    return total


def class_balance(logits):
    """sum_k m_k log m_k of the mean answer m; Chen et al. 2019 (DAFL), equation 6."""
    rows = [softmax(z) for z in logits]
    means = [sum(row[k] for row in rows) / len(rows) for k in range(len(rows[0]))]
    return sum(m * torch.log(m) for m in means)


def total_variation(images):
    """Mean |difference| of neighbours, down plus across; Mahendran & Vedaldi 2015, section 3."""
    down, across = [], []
    batch, channels, height, width = images.shape
    for b in range(batch):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    here = images[b, c, i, j]
                    if i + 1 < height:
                        down.append(abs(images[b, c, i + 1, j] - here))
                    if j + 1 < width:
                        across.append(abs(images[b, c, i, j + 1] - here))
    return sum(down) / len(down) + sum(across) / len(across)


def logit_l1(student, teacher):
    """(1/K) sum_k |s_k - t_k| per row; Fang et al. 2019 (DFAD), equation 3."""
    return torch.stack(
        [
            sum(abs(a - b) for a, b in zip(s, t, strict=True)) / len(s)
            for s, t in zip(student, teacher, strict=True)
        ]
    )


def soft_cross_entropy(logits, targets):
    """- sum_k y_k log p_k per row, y probabilities; Wang 2021, the transfer set's loss."""
    return torch.stack(
        [
            -sum(y * torch.log(p) for y, p in zip(row, softmax(z), strict=True))
            for z, row in zip(logits, targets, strict=True)
        ]
    )


def jensen_shannon_of_logits(student, teacher, temperature):
    """(KL(p || m) + KL(q || m)) / 2 per row, differentiable; Yin et al. 2020, equation 9."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for q, p in zip(softmax(s, temperature), softmax(t, temperature), strict=True):
            middle = (p + q) / 2
            total = total + p * torch.log(p / middle) + q * torch.log(q / middle)
        values.append(total / 2)
    return torch.stack(values)


class AdamOfOne:
    """Adam on one tensor, in place; Kingma & Ba 2015, algorithm 1."""

    def __init__(self, rate, betas=(0.5, 0.999), epsilon=1e-8):
        self.rate, self.betas, self.epsilon = rate, betas, epsilon
        self.first = self.second = 0.0
        self.steps = 0

    def step(self, values, gradient):
        self.steps += 1
        a, b = self.betas
        self.first = a * self.first + (1 - a) * gradient
        self.second = b * self.second + (1 - b) * gradient**2
        first = self.first / (1 - a**self.steps)
        second = self.second / (1 - b**self.steps)
        with torch.no_grad():
            values -= self.rate * first / (second.sqrt() + self.epsilon)


def info_nce(anchors, others, temperature):
    """Oord et al. 2018, equation 4, with cosines (CMI, equation 7): one number for each anchor."""

    def cosine(a, b):
        return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()

    values = []
    for i, anchor in enumerate(anchors):
        scores = [(cosine(anchor, other) / temperature).exp() for other in others]
        values.append(-(scores[i] / sum(scores)).log())
    return torch.stack(values)


def noisy_logits(logits, coins, noise):
    """Sau & Balasubramanian 2016, section 3: z' = z (1 + xi) where the sample's coin says so."""
    rows = []
    for row, coin, xi in zip(logits, coins, noise, strict=True):
        rows.append(torch.stack([z * (1 + x) if coin else z for z, x in zip(row, xi, strict=True)]))
    return torch.stack(rows)


def hierarchical(nested, target, a, temperature, leaves=(), leaf_weight=0.0):
    """Ruiz & Verbeek 2020, section 3.2: sum_b (1 - a) CE(F_b, y) + a T^2 KL(F_D || F_b).

    With sum_n w CE(f_n, y) over leaves.
    """
    total = 0.0
    for logits in leaves:
        known = [(z, int(y)) for z, y in zip(logits, target, strict=True) if y >= 0]
        total = total - leaf_weight * sum(z.log_softmax(0)[y] for z, y in known) / len(known)
    for b, logits in enumerate(nested):
        known = [(z, int(y)) for z, y in zip(logits, target, strict=True) if y >= 0]
        total = total - (1 - a) * sum(z.log_softmax(0)[y] for z, y in known) / len(known)
        if b < len(nested) - 1:
            for z, full in zip(logits, nested[-1].detach(), strict=True):
                p, q = (full / temperature).softmax(0), (z / temperature).softmax(0)
                gap = sum(x * (x / y).log() for x, y in zip(p, q, strict=True))
                total = total + a * temperature**2 * gap / len(logits)
    return total


def balanced(probabilities, frequencies):
    """Radosavovic et al. 2018, section 3.3, for one class an image: the surest of each class."""
    rows = [[float(p) for p in row] for row in probabilities]
    shares = [float(f) / float(frequencies.sum()) for f in frequencies]
    likeliest = [row.index(max(row)) for row in rows]
    candidates = [[n for n, c in enumerate(likeliest) if c == k] for k in range(len(shares))]
    scale = min(
        [1.0]
        + [len(mine) / (len(rows) * f) for mine, f in zip(candidates, shares, strict=True) if f > 0]
    )
    labels = [-1] * len(rows)
    for k, mine in enumerate(candidates):
        mine.sort(key=lambda n: -max(rows[n]))
        for n in mine[: int(scale * len(rows) * shares[k] + 1e-6)]:
            labels[n] = k
    return labels
