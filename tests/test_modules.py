"""The quantiser and the prior against slow, independent computations of what the papers say."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import modules
import utils
from modules import VQVAE, GatedPixelCNN, PixelCNNConfig, VectorQuantizer, VQVAEConfig


def vectors(n=6, d=4, h=3, w=5, seed=0):
    return torch.randn(n, d, h, w, generator=torch.Generator().manual_seed(seed))


def started_quantizer(k=8, d=4, **options):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(k, d, **options)
    quantizer.codebook.data.normal_()
    quantizer.initialised.fill_(True)
    return quantizer


# ---------------------------------------------------------------------------------- stage 1


def test_codes_are_the_nearest_codebook_vectors():
    quantizer = started_quantizer().eval()
    z = vectors()
    _, codes, _ = quantizer(z)
    for b, i, j in np.ndindex(6, 3, 5):
        distances = [(z[b, :, i, j] - e).square().sum() for e in quantizer.codebook]
        assert codes[b, i, j] == int(np.argmin(distances))


def test_gradient_passes_straight_through_and_commits_with_beta():
    quantizer = started_quantizer(beta=0.7).eval()
    z = vectors().requires_grad_()
    z_q, codes, losses = quantizer(z)
    weights = torch.randn_like(z_q)
    (z_q * weights).sum().backward()
    assert torch.equal(z.grad, weights)

    z.grad = None
    _, _, losses = quantizer(z)
    losses["commitment"].backward()
    expected = 0.7 * 2 * (z - quantizer.lookup(codes)) / z.numel()
    torch.testing.assert_close(z.grad, expected.detach())
    assert quantizer.codebook.grad is None


def test_codebook_loss_moves_codes_alone_and_without_beta():
    quantizer = started_quantizer(beta=0.7, codebook="loss").eval()
    z = vectors().requires_grad_()
    _, codes, losses = quantizer(z)
    losses["codebook"].backward()
    assert not z.grad.any()
    flat = z.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    expected = torch.zeros(8, 4)
    for vector, code in zip(flat, codes.flatten(), strict=True):
        expected[code] += 2 * (quantizer.codebook[code].detach() - vector) / z.numel()
    torch.testing.assert_close(quantizer.codebook.grad, expected)


def test_more_vectors_than_one_part_give_the_codes_and_losses_of_the_whole():
    quantizer = started_quantizer(k=32, beta=1.0, codebook="loss").eval()
    z = vectors(n=3, h=41, w=27)  # 3321 vectors: three whole parts and one cut short
    _, codes, losses = quantizer(z)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 4).double()
    distances = torch.cdist(flat, quantizer.codebook.detach().double())
    assert torch.equal(codes.flatten(), distances.argmin(1))
    expected = distances.min(1).values.square().mean() / 4
    for name in ("commitment", "codebook"):
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-5)


def test_diversity_is_the_missing_entropy_of_the_soft_assignment():
    quantizer = started_quantizer(diversity=0.5).train()
    z = vectors().requires_grad_()
    codebook = quantizer.codebook.double().clone()  # before the moving average
    _, _, losses = quantizer(z)
    flat = z.detach().permute(0, 2, 3, 1).reshape(-1, 4).double()
    far = torch.cdist(flat, codebook).square() / 4 * 32
    p = torch.softmax(-far, 1).mean(0)
    expected = 0.5 * (math.log(8) + (p * p.log()).sum())
    assert losses["diversity"].item() == pytest.approx(expected.item(), abs=1e-5)
    losses["diversity"].backward()
    step = z.detach() - 1e-3 * z.grad / z.grad.norm()
    flat = step.permute(0, 2, 3, 1).reshape(-1, 4).double()
    p = torch.softmax(-torch.cdist(flat, codebook).square() / 4 * 32, 1).mean(0)
    slope = (0.5 * (math.log(8) + (p * p.log()).sum()) - expected) / 1e-3
    assert slope.item() == pytest.approx(-z.grad.norm().item(), rel=0.02)


def test_moving_averages_against_a_slow_loop_in_float64():
    quantizer = started_quantizer(revive=False).train()
    decay = quantizer.DECAY
    count = torch.full((8,), 1 / 8, dtype=torch.float64)  # (sum, count) of [1] appendix A.1, each
    total = quantizer.codebook.double() / 8  # as a share of the batch
    for step in range(40):
        z = vectors(seed=step)
        codebook = quantizer.codebook.clone()
        _, codes, _ = quantizer(z)
        flat = z.permute(0, 2, 3, 1).reshape(-1, 4).double()
        for k in range(8):
            members = [v for v, c in zip(flat, codes.flatten(), strict=True) if c == k]
            mean = sum(members, torch.zeros(4).double()) / len(flat)
            count[k] = decay * count[k] + (1 - decay) * len(members) / len(flat)
            total[k] = decay * total[k] + (1 - decay) * mean
        assert not torch.equal(codebook, quantizer.codebook)
    expected = total / count[:, None]
    torch.testing.assert_close(quantizer.codebook.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.count.double(), count, rtol=1e-4, atol=1e-5)


def test_unused_codes_stay_where_they_are():
    quantizer = started_quantizer(revive=False).train()
    quantizer.codebook[3] = 1e3
    for step in range(3000):
        quantizer(vectors(n=1, seed=step))
    assert torch.equal(quantizer.codebook[3], torch.full((4,), 1e3))


def test_evaluation_changes_no_state():
    quantizer = started_quantizer().eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(vectors())
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_first_training_batch_places_the_codes_once():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 4).train()
    z = vectors() + 50
    quantizer(z)
    assert quantizer.codebook.min() > 40  # among the data, far from where they were made
    restored = VectorQuantizer(8, 4)
    restored.load_state_dict(quantizer.state_dict())
    assert restored.initialised


def test_a_first_batch_that_is_not_finite_places_nothing():
    quantizer = VectorQuantizer(8, 4).train()
    bad = vectors()
    bad[0, 0, 0, 0] = torch.nan
    quantizer(bad)
    assert not quantizer.initialised
    quantizer(vectors())
    assert quantizer.initialised
    assert quantizer.codebook.isfinite().all()


def test_a_restored_quantizer_moves_as_the_original_would():
    quantizer = started_quantizer().train()
    quantizer(vectors())
    restored = VectorQuantizer(8, 4).train()
    restored.load_state_dict(quantizer.state_dict())
    for q in (quantizer, restored):
        torch.manual_seed(1)
        q(vectors(seed=1))
    for a, b in zip(quantizer.state_dict().values(), restored.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_dead_codes_are_revived_among_the_data_with_all_their_state():
    quantizer = started_quantizer().train()
    quantizer.codebook[5] = 1e3
    quantizer.count[5] = 0.0
    z = vectors()
    quantizer(z)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 4)
    revived = quantizer.codebook[5].clone()
    assert (flat - revived).abs().sum(1).min() == 0
    assert quantizer.count[5] == 1 / 8
    away = vectors(seed=1)
    away[:] = quantizer.codebook[0][None, :, None, None]  # every vector chooses code 0
    quantizer(away)
    assert torch.equal(quantizer.codebook[5], revived)


def test_codes_do_not_depend_on_autocast():
    quantizer = started_quantizer(k=64).eval()
    z = vectors(n=64)
    _, plain, _ = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, cast, _ = quantizer(z)
    assert torch.equal(plain, cast)


def test_codebook_order_is_only_a_matter_of_names():
    quantizer = started_quantizer().eval()
    z_q, codes, _ = quantizer(vectors())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    quantizer.codebook.copy_(quantizer.codebook[order])
    z_q2, codes2, _ = quantizer(vectors())
    assert torch.equal(z_q, z_q2)
    assert torch.equal(order[codes2], codes)


@pytest.mark.parametrize("stem", ["fold", "strided"])
@pytest.mark.parametrize("downsample", [4, 8, 16])
@pytest.mark.parametrize("size", [(64, 32), (48, 80)])
def test_vq_vae_keeps_the_size_and_codes_decode_to_its_output(stem, downsample, size):
    torch.manual_seed(0)
    config = VQVAEConfig(8, 8, 1, 4, 16, downsample=downsample, stem=stem)
    model = VQVAE(config).eval()
    x = torch.rand(2, 1, *size)
    x_hat, codes, _ = model(x)
    assert x_hat.shape == x.shape
    assert codes.shape == (2, size[0] // downsample, size[1] // downsample)
    assert torch.equal(model.encode(x), codes)
    torch.testing.assert_close(model.decode(codes), x_hat, rtol=1e-4, atol=1e-5)


def test_residual_blocks_have_weights_of_their_own():
    stack = modules.residual_stack(VQVAEConfig(n_residual_layers=3))
    assert len({id(p) for p in stack.parameters()}) == 3 * 4


# ---------------------------------------------------------------------------------- stage 2


def prior(k=7, size=(5, 9), n_classes=0, **options):
    torch.manual_seed(0)
    options = {"n_channels": 8, "n_layers": 3, "kernel_size": 3, "dropout": 0.0} | options
    model = GatedPixelCNN(PixelCNNConfig(k, size, n_classes=n_classes, **options)).eval()
    for parameter in model.parameters():  # nothing may hide behind a weight that starts at zero
        parameter.data.normal_(std=0.5)
    return model


def within_reach(i, j, a, b, n_layers, r):
    """Whether position (i, j) can see (a, b): the vertical stack widens by r columns a layer."""
    if a == i:
        return b < j and j - b <= 1 + n_layers * r
    up = i - a
    return 0 < up <= 1 + n_layers * r and abs(j - b) <= n_layers * r


@pytest.mark.parametrize("size", [(5, 9), (9, 5), (7, 11)])
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("mirror", ["none", "rows", "columns"])
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("summary", [False, True])
def test_causality_by_gradients_everywhere(size, kernel_size, mirror, order, summary):
    """Zero from itself and the future, not from the past in reach: no leak, no blind spot."""
    options = {"kernel_size": kernel_size, "mirror": mirror, "order": order, "summary": summary}
    model = prior(size=size, n_layers=3, **options).double()
    rows, columns = size
    if order == "columns":  # from here on all is turned, as if each column were a row
        rows, columns = columns, rows
        mirror = {"rows": "columns", "columns": "rows"}.get(mirror)
    # eight inputs, since a ReLU may well hide a way from any one of them
    embedded = torch.randn(8, rows, columns, 8, dtype=torch.double, requires_grad=True)
    model.embedding = torch.nn.Module()
    model.embedding.forward = lambda codes: embedded
    logits = model(torch.zeros(8, *size, dtype=torch.long))
    logits = logits.mT if order == "columns" else logits

    def is_near_image(i, j, a, b):
        if mirror == "rows" and i >= rows - rows // 2:
            return a < rows // 2 and abs(a - (rows - 1 - i)) <= 3 and abs(b - j) <= 3
        if mirror == "columns" and j >= columns - columns // 2:
            return b < columns // 2 and i - 3 <= a <= i and abs(b - (columns - 1 - j)) <= 3
        return False

    for i, j in np.ndindex(rows, columns):
        (grad,) = torch.autograd.grad(logits[:, :, i, j].sum(), embedded, retain_graph=True)
        seen = grad.abs().sum((0, -1)) > 0
        for a, b in np.ndindex(rows, columns):
            if (a, b) >= (i, j):
                assert not seen[a, b], f"{(i, j)} sees {(a, b)}"
            elif (
                within_reach(i, j, a, b, 3, kernel_size // 2)
                or is_near_image(i, j, a, b)
                or (summary and a < i)
            ):
                assert seen[a, b], f"{(i, j)} is blind to {(a, b)}"


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("size", [(5, 9), (9, 5), (7, 11), (1, 6), (6, 1)])
@pytest.mark.parametrize("mirror", ["none", "rows", "columns"])
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("summary", [False, True])
def test_cached_logits_equal_the_full_pass(size, kernel_size, mirror, order, summary):
    options = {"kernel_size": kernel_size, "mirror": mirror, "order": order, "summary": summary}
    model = prior(size=size, n_classes=3, **options)
    codes = torch.randint(7, (4, *size))
    label, depth = torch.tensor([0, 2, -1, 1]), torch.tensor([0.3, -1, 1, 0])
    full, known = model(codes, label, depth), torch.full_like(codes, -1)
    places = []
    for i, j, logits in model.logits_in_order(known, label, depth):
        torch.testing.assert_close(logits, full[:, :, i, j], rtol=0, atol=1e-4)
        known[:, i, j] = codes[:, i, j]
        places.append((i, j))
    of_lines = places if order == "rows" else [(j, i) for i, j in places]
    assert of_lines == list(np.ndindex(*model.config.lines))


@pytest.mark.parametrize("mirror", ["none", "rows", "columns"])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_probabilities_of_all_grids_sum_to_one(mirror, order):
    model = prior(k=2, size=(2, 3), mirror=mirror, order=order, summary=True).double()
    grids = torch.tensor(list(itertools.product([0, 1], repeat=6))).view(-1, 2, 3)
    log_p = -F.cross_entropy(model(grids), grids, reduction="none").sum((1, 2))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 2},
        {"label": 1, "depth": 0.3},
        {"label": 1, "depth": 0.3, "guidance": 1.5},
        {"given": 1},
        {"each its own generator": True},
        {"mirror": "rows"},
        {"mirror": "columns"},
        {"mirror": "rows", "order": "columns"},
        {"summary": True},
        {"summary": True, "mirror": "rows", "order": "columns"},
    ],
    ids=str,
)
def test_sampled_frequencies_match_the_exact_distribution(options):
    options, n = options.copy(), 20000
    k = 2 if "top_k" not in options else 3
    kind = {name: options.pop(name) for name in ("mirror", "order", "summary")
            if name in options}  # fmt: skip
    model = prior(k=k, size=(2, 3), n_classes=2, **kind)
    grids = torch.tensor(list(itertools.product(range(k), repeat=6))).view(-1, 2, 3)
    known = [
        torch.full((len(grids),), options[name]) if name in options else None
        for name in ("label", "depth")
    ]
    logits = model(grids, *known)
    if w := options.get("guidance"):
        told, untold = logits.log_softmax(1), model(grids).log_softmax(1)
        logits = told + w * (told - untold).clamp(max=modules.GatedPixelCNN.MOST_TOLD)
    logits = logits / options.get("temperature", 1)
    if "top_k" in options:
        logits = logits.masked_fill(logits < logits.topk(2, 1).values[:, -1:], -torch.inf)
    log_p = -F.cross_entropy(logits, grids, reduction="none")  # of each code
    generator = torch.Generator().manual_seed(0)
    if options.pop("each its own generator", False):
        generator = [utils.generator(0, i) for i in range(n)]
    if "given" in options:  # a code in the middle, that no code before it depends on
        wrong = grids[:, 0, 2] != options["given"]
        log_p[:, 0, 2] = torch.where(wrong, -torch.inf, 0.0)
        options["given"] = torch.full((n, 2, 3), -1)
        options["given"][:, 0, 2] = 1
    p = log_p.sum((1, 2)).exp().double()
    drawn = model.sample(n, generator=generator, **options)
    places = (drawn.flatten(1) * k ** torch.arange(5, -1, -1)).sum(1)
    observed = torch.bincount(places, minlength=len(grids)).double()
    assert observed[p == 0].sum() == 0
    expected = n * p
    common = expected >= 5  # the chi-square approximation needs counts that are not tiny
    chi2 = ((observed - expected)[common] ** 2 / expected[common]).sum().item()
    freedom = int(common.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_the_same_seed_draws_the_same_and_temperature_zero_is_deterministic(order):
    model = prior(order=order)
    a, b = (model.sample(3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(model.sample(3, temperature=0), model.sample(3, temperature=0))
    lines = []
    codes = model.sample(2, temperature=0, progress=lambda: lines.append(1))
    assert torch.equal(model(codes).argmax(1), codes)
    assert len(lines) == {"rows": 5, "columns": 9}[order]
    for hardly_warm in (1e-30, 1e-50):
        assert torch.equal(model.sample(2, temperature=hardly_warm), codes)


def test_a_grid_with_a_generator_of_its_own_does_not_depend_on_the_batch():
    model = prior()
    together = model.sample(4, generator=[torch.Generator().manual_seed(i) for i in range(4)])
    alone = model.sample(1, generator=[torch.Generator().manual_seed(2)])
    assert torch.equal(together[2], alone[0])


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("mirror", ["none", "rows", "columns"])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_given_codes_are_kept_and_seen(guidance, mirror, order):
    """Whether the hidden ones come last or lie in the middle."""
    model = prior(k=5, n_classes=3, mirror=mirror, order=order, summary=True)
    label, depth = torch.tensor([0, 1, 2]), torch.rand(3)
    for hidden in (np.s_[:, 2:], np.s_[:, 1:3, 2:6]):
        given = torch.randint(5, (3, 5, 9))
        given[hidden] = -1
        drawn = model.sample(
            3, label=label, depth=depth, given=given, temperature=0, guidance=guidance
        )
        told, untold = model(drawn, label, depth).log_softmax(1), model(drawn).log_softmax(1)
        best = (told + guidance * (told - untold).clamp(max=model.MOST_TOLD)).argmax(1)
        assert torch.equal(drawn, torch.where(given < 0, best, given))


def test_the_order_of_the_codes_is_only_a_matter_of_names_to_the_prior():
    model = prior(k=7, mirror="rows", summary=True)
    codes = torch.randint(7, (2, 5, 9))
    logits = model(codes)
    order = torch.randperm(7)
    model.embedding.weight.data = model.embedding.weight.data[order]
    model.head[-1].weight.data = model.head[-1].weight.data[order]
    model.head[-1].bias.data = model.head[-1].bias.data[order]
    renamed = order.argsort()[codes]
    torch.testing.assert_close(model(renamed), logits[:, order])


@pytest.mark.parametrize("most", [0.5, 9.0])
def test_guidance_exaggerates_what_label_and_depth_change(most, monkeypatch):
    monkeypatch.setattr(GatedPixelCNN, "MOST_TOLD", most)
    model, label, depth = prior(n_classes=2), torch.tensor([0, 1]), torch.tensor([0.2, 0.9])
    drawn = model.sample(2, label=label, depth=depth, guidance=1.5, temperature=0)
    told, untold = model(drawn, label, depth).log_softmax(1), model(drawn).log_softmax(1)
    assert torch.equal((told + 1.5 * (told - untold).clamp(max=most)).argmax(1), drawn)
    uncapped = (told + 1.5 * (told - untold)).argmax(1)
    assert torch.equal(uncapped, drawn) == (most == 9.0)
    assert not torch.equal(told.argmax(1), drawn)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    unguided, nothing_to_guide = (
        model.sample(2, label=-1, guidance=w, generator=g)
        for w, g in zip((0, 2), seeds, strict=True)
    )
    assert torch.equal(unguided, nothing_to_guide)


def test_a_summary_is_the_weighted_mean_of_the_lines_before():
    """As a loop over lines, heads and codes has it; and the first line has none to go by."""
    model = prior(summary=True, n_channels=12).double()
    summary, e = model.summary, torch.randn(2, 12, 5, 9, dtype=torch.double)
    told = summary(e)
    value, weight = summary.values(e), summary.weights(e).exp()
    for i in range(5):
        mean = torch.zeros(2, 12, 1, 1, dtype=torch.double)
        for head in range(4):
            own = slice(3 * head, 3 * head + 3)
            w = weight[:, head : head + 1, :i]
            total = (w * value[:, own, :i]).sum((2, 3))
            mean[:, own, 0, 0] = total / (w.sum((2, 3)) + 1e-3)
        expected = summary.out(summary.inner(mean).relu())
        torch.testing.assert_close(told[:, :, i : i + 1], expected)


def test_what_cannot_be_drawn_is_refused():
    model = prior(n_classes=2)
    too_high = torch.full((1, 5, 9), 7)
    for wrong in ({"label": 2}, {"label": -2}, {"depth": 1.5}, {"depth": -0.5}, {"top_k": 0},
                  {"temperature": -1}, {"guidance": -1}, {"given": too_high}):  # fmt: skip
        with pytest.raises(ValueError, match="temperature|labels|given"):
            model.sample(1, **wrong)


def test_labels_change_the_distribution_and_none_means_any():
    model = prior(n_classes=2)
    codes = torch.randint(7, (2, 5, 9))
    logits = [model(codes, torch.tensor([k, k])) for k in (0, 1, -1)]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    assert torch.equal(model(codes), logits[2])


def test_codes_of_like_vectors_start_alike():
    model = prior(k=40, n_channels=24)
    codebook = torch.randn(40, 8)
    codebook[1] = codebook[0] + 0.01
    scale = model.embedding.weight.std().item()
    model.start_from(codebook)
    assert model.embedding.weight.std().item() == pytest.approx(scale, rel=0.2)
    for weight in (model.embedding.weight, model.head[-1].weight.flatten(1)):
        between = torch.cdist(weight, weight)
        assert between[0, 1] < 0.7 * between[0, 2:].min()
        near = torch.corrcoef(
            torch.stack([between.flatten(), torch.cdist(codebook, codebook).flatten()])
        )
        assert near[0, 1] > 0.7


def test_depth_changes_the_distribution_smoothly_and_none_means_any():
    model = prior().double()
    codes = torch.randint(7, (1, 5, 9))
    at = [model(codes, depth=torch.tensor([x]).double()) for x in (0.5, 0.5 + 1e-6, 0.8, -1)]
    assert torch.allclose(at[0], at[1], atol=1e-2)
    assert not torch.allclose(at[0], at[2], atol=1e-1)
    assert not torch.allclose(at[0], at[3], atol=1e-1)
    assert torch.equal(model(codes), at[3])


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match="draws grids"):
        prior().sample(1, size=(9, 5))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_hides_its_share_anywhere_alike_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(16, 30, 25, 9, requires_grad=True)
    dropout = modules.Dropout(p)
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    values = y.detach().unique()
    torch.testing.assert_close(values, torch.tensor([0, 1 / (1 - p)]), rtol=1e-3, atol=0)
    hidden = (y.detach() == 0).double()
    for axis in range(4):
        share = hidden.movedim(axis, 0).flatten(1)
        noise = (p * (1 - p) / share.shape[1]) ** 0.5
        assert (share.mean(1) - p).abs().max() < 4.5 * noise
    # neighbours in memory are drawn of one random word
    in_memory = hidden.permute(0, 2, 3, 1).flatten()
    for shift in (1, 2, 3, 4):
        both = (in_memory[shift:] * in_memory[:-shift]).mean()
        assert abs(both - p * p) < 4.5 * (p * p / len(in_memory)) ** 0.5
    assert not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)
