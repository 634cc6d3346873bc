"""The networks, in the order of the two papers.

A VQ-VAE [1] turns a slice into a small grid of discrete codes and back: `Encoder`,
`VectorQuantizer`, `Decoder`, `VQVAE`. A gated PixelCNN [2] learns how those codes are distributed
and draws new grids of them: `GatedLayer`, `GatedPixelCNN`.

[1] van den Oord et al. 2017, Neural Discrete Representation Learning, arXiv 1711.00937.
[2] van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders, arXiv 1606.05328.
[3] Ramachandran et al. 2017, Fast Generation for Convolutional Autoregressive Models, 1704.06001.
[4] Ho & Salimans 2022, Classifier-Free Diffusion Guidance, arXiv 2207.12598.

Shapes: images (B, 1, H, W) in [0, 1]; codes (B, h, w) int64 in [0, K); h = H / f, w = W / f.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import distributed, nn

# ------------------------------------------------------------------------------------------------
# Stage 1: the VQ-VAE [1]
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VQVAEConfig:
    """Architecture of a VQ-VAE; all that is needed to rebuild it."""

    n_hiddens: int = 96  # channels of the encoder and decoder
    n_residual_hiddens: int = 96  # channels inside a residual block
    n_residual_layers: int = 2  # residual blocks per resolution
    embedding_dim: int = 32  # D, length of a codebook vector
    n_embeddings: int = 512  # K, size of the codebook
    beta: float = 0.25  # weight of the commitment term, [1] eq. 3
    downsample: int = 8  # f, pixels per code along each axis: 4, 8 or 16
    stem: str = "fold"  # "fold" 4 x 4 pixels into channels, or "strided" convolutions as in [1]
    codebook: str = "ema"  # "ema", moving averages as in [1] appendix A.1, or "loss", [1] eq. 3
    revive: bool = True  # place the codes by k-means at the start, and move those that die
    diversity: float = 0.0  # weight of the term that asks for all codes to be used alike

    def __post_init__(self):
        if self.downsample not in (4, 8, 16):
            raise ValueError(f"downsample must be 4, 8 or 16, not {self.downsample}")
        if self.stem not in ("fold", "strided"):
            raise ValueError(f"stem must be 'fold' or 'strided', not {self.stem!r}")
        if self.codebook not in ("ema", "loss"):
            raise ValueError(f"codebook must be 'ema' or 'loss', not {self.codebook!r}")


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), as in [1] section 4.1."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.conv2.weight)  # each block starts as the identity
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def residual_stack(config):
    """`n_residual_layers` blocks, each with weights of its own."""
    return nn.Sequential(
        *(
            ResidualBlock(config.n_hiddens, config.n_residual_hiddens)
            for _ in range(config.n_residual_layers)
        )
    )


class UnitRMS(nn.Module):
    """Scale each vector (along dim 1) to a root mean square of 1.

    Without it the encoder's output grows a hundredfold in the first updates, faster than the
    codebook can follow, and all but a few codes die.
    """

    def forward(self, z):
        return F.normalize(z.float(), dim=1) * z.shape[1] ** 0.5


class Encoder(nn.Sequential):
    """(B, 1, H, W) -> (B, D, h, w): down to 1/4 by the stem, then by halves to 1/f."""

    def __init__(self, config):
        c = config.n_hiddens
        if config.stem == "fold":
            layers = [nn.PixelUnshuffle(4), nn.Conv2d(16, c, 3, padding=1)]
        else:
            layers = [
                nn.Conv2d(1, c // 2, 4, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(c // 2, c, 4, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(c, c, 3, padding=1),
            ]
        layers.append(residual_stack(config))
        for _ in range(int(math.log2(config.downsample)) - 2):
            layers += [nn.ReLU(), nn.Conv2d(c, c, 4, stride=2, padding=1), residual_stack(config)]
        layers += [nn.ReLU(), nn.Conv2d(c, config.embedding_dim, 1)]
        if config.stem == "fold":
            layers.append(UnitRMS())
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """(B, D, h, w) -> (B, 1, H, W): the encoder's mirror image."""

    def __init__(self, config):
        c = config.n_hiddens
        layers = [nn.Conv2d(config.embedding_dim, c, 3, padding=1), residual_stack(config)]
        for _ in range(int(math.log2(config.downsample)) - 2):
            layers += [nn.ReLU(), nn.Conv2d(c, 4 * c, 1), nn.PixelShuffle(2)]
            layers.append(residual_stack(config))
        if config.stem == "fold":
            layers += [nn.ReLU(), nn.Conv2d(c, 16, 3, padding=1), nn.PixelShuffle(4)]
        else:
            layers += [
                nn.ReLU(),
                nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1),
                nn.ReLU(),
                nn.ConvTranspose2d(c // 2, 1, 4, stride=2, padding=1),
            ]
        super().__init__(*layers)


class NearestCode(torch.autograd.Function):
    """Nearest codebook vectors, with the three gradients of [1] section 3.

    Works through the vectors in parts that stay in a processor's cache, and keeps nothing of size
    N x K, nor of size N x D but z and the output: autograd's way takes some ten times the memory.

    forward: z (N, D), codebook e (K, D) -> e of each z (N, D), codes (N,), the mean of |z - e|^2
        over N and D, once as the commitment and once as the codebook term, and the loss of
        `of_some`: (loss, rows of z that it depends on, its gradient there).
    backward: z gets the output's gradient as it is (straight through) and those of the commitment
        term and of the loss; the codebook gets that of the codebook term.
    """

    PART = 1024

    @staticmethod
    def forward(ctx, z, e, of_some=None):
        codes = torch.empty(len(z), dtype=torch.int64, device=z.device)
        z_q = torch.empty_like(z)
        error = z.new_zeros(())
        for part in torch.arange(len(z)).split(NearestCode.PART):
            part = slice(part[0], part[-1] + 1)
            codes[part] = distances(z[part], e).argmin(1)
            z_q[part] = e[codes[part]]
            error += (z[part] - z_q[part]).square().sum()
        ctx.save_for_backward(z, z_q, codes)
        ctx.mark_non_differentiable(codes)
        ctx.n_embeddings, ctx.of_some = len(e), of_some
        loss = of_some[0].clone() if of_some else z.new_zeros(())
        return z_q, codes, error / z.numel(), error / z.numel(), loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_z_q, _, of_commitment, of_codebook, of_loss):
        z, z_q, codes = ctx.saved_tensors
        to_z = torch.addcmul(of_z_q, z, of_commitment * (2 / z.numel()))
        to_z.addcmul_(z_q, of_commitment * (-2 / z.numel()))
        if ctx.of_some:
            _, rows, gradient = ctx.of_some
            to_z.index_add_(0, rows, of_loss * gradient)
        to_e = None
        if ctx.needs_input_grad[1]:
            to_e = z.new_zeros(ctx.n_embeddings, z.shape[1])
            to_e.index_add_(0, codes, z_q).index_add_(0, codes, z, alpha=-1)
            to_e *= of_codebook * (2 / z.numel())
        return to_z, to_e, None


def distances(z, e):
    """(N, D), (K, D) -> (N, K): squared distances less |z|^2, which is the same for every code."""
    return torch.addmm(e.pow(2).sum(1), z, e.t(), alpha=-2)


def processes():
    """(Number of this process, how many train together): (0, 1) unless torchrun started several."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def over_processes(x):
    """A tensor -> its sum over the processes that train together."""
    if processes()[1] > 1:
        x = x.clone()
        distributed.all_reduce(x)
    return x


class VectorQuantizer(nn.Module):
    """Nearest codebook vector with a straight-through gradient, [1] section 3.

    With `codebook="ema"` each code is the moving average of the vectors assigned to it ([1]
    appendix A.1), kept as (mean, count) rather than (sum, count): the same numbers, but a code that
    is not used keeps its place exactly, and a revived code has no stale sum to be dragged back by.
    With `revive` the first training batch places the codes (k-means), and a code that hardly any
    vector chooses is moved onto a vector of the current batch.

    All state, the data-dependent start's flag included, is in buffers and so in checkpoints.
    Distances are computed in float32 whatever the autocast. Processes that train together agree on
    all of it: sums are over the batches of all, and vectors are drawn from all of them, if their
    random numbers begin alike.
    """

    DECAY = 0.95  # of the moving averages, per batch; slower ones lose track of a young encoder
    DEAD = 0.05  # a code chosen less often than this share of the mean is moved
    SOME = 4096  # vectors of a batch that the diversity term looks at
    SOFTNESS = 1 / 32  # of its soft assignment, in mean squared difference per dimension

    def __init__(
        self, n_embeddings, embedding_dim, beta=0.25, codebook="ema", revive=True, diversity=0.0
    ):
        super().__init__()
        self.n_embeddings = n_embeddings
        self.beta = beta
        self.revive = revive
        self.diversity = diversity
        vectors = torch.empty(n_embeddings, embedding_dim)
        vectors.uniform_(-1 / n_embeddings, 1 / n_embeddings)
        if codebook == "ema":
            self.register_buffer("codebook", vectors)
        else:
            self.codebook = nn.Parameter(vectors)
        self.learns_by_loss = codebook == "loss"
        # moving average of each code's share of a batch
        self.register_buffer("count", torch.full((n_embeddings,), 1 / n_embeddings))
        self.register_buffer("initialised", torch.tensor(not revive))

    def forward(self, z):
        """Quantise z.

        Args:
            z: (B, D, h, w) encoder output.
        Returns:
            z_q: (B, D, h, w) codebook vectors; their gradient passes straight through to z.
            codes: (B, h, w) int64.
            losses: dict of scalars: "commitment", beta |z - sg(e)|^2; with `codebook="loss"` also
                "codebook", |sg(z) - e|^2 ([1] eq. 3); in training, with `diversity`, "diversity".
        """
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (N, D)
            if self.training and not self.initialised and over_processes(flat.sum()).isfinite():
                self._start(flat.detach())
            is_spread = self.training and self.diversity
            quantised, codes, commitment, codebook, sameness = NearestCode.apply(
                flat, self.codebook, self._sameness(flat.detach()) if is_spread else None
            )
            losses = {"commitment": self.beta * commitment}
            if self.learns_by_loss:
                losses["codebook"] = codebook
            if is_spread:
                losses["diversity"] = self.diversity * sameness
            if self.training:
                self._update(flat.detach(), codes)
        b, d, h, w = z.shape
        z_q = quantised.view(b, h, w, d).permute(0, 3, 1, 2)
        return z_q, codes.view(b, h, w), losses

    def lookup(self, codes):
        """(B, h, w) codes -> (B, D, h, w) codebook vectors."""
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    @torch.enable_grad()
    def _sameness(self, flat):
        """log K - entropy of the mean soft assignment of (some of) a batch: 0 if all codes are used
        alike, log K if only one is. Where much of an image is background, one code would else take
        a quarter of all places and tell nothing there about the edge nearby.

        Returns the loss, the rows of `flat` it was taken of, and its gradient there.
        """
        rank, n_processes = processes()
        some = torch.randperm(n_processes * len(flat), device=flat.device)[: self.SOME]
        rows = some[some // len(flat) == rank] % len(flat)
        own = flat[rows].requires_grad_()
        far = distances(own, self.codebook.detach())
        p = far.div_(-self.SOFTNESS * flat.shape[1]).softmax(1).sum(0)
        # the value is that of all; gradients are averaged over the processes, and this is a sum
        p = over_processes(p.detach()) + n_processes * (p - p.detach())
        p = p / len(some)
        loss = math.log(self.n_embeddings) + (p * (p + 1e-9).log()).sum()
        return loss.detach(), rows, torch.autograd.grad(loss, own)[0]

    @torch.no_grad()
    def _start(self, flat, n_steps=10):
        """k-means on the first batch: random vectors of it, then a few Lloyd steps."""
        self.codebook.copy_(self._draw(flat, self.n_embeddings))
        for _ in range(n_steps):
            n, total = self._totals(flat, NearestCode.apply(flat, self.codebook)[1])
            self.codebook.copy_(
                torch.where(n[:, None] > 0, total / n.clamp(min=1)[:, None], self.codebook)
            )
        self.count.fill_(1 / self.n_embeddings)
        self.initialised.fill_(True)

    @torch.no_grad()
    def _update(self, flat, codes):
        n, total = self._totals(flat, codes)
        if not total.isfinite().all():
            return  # one bad batch must not end in the codebook for good
        size = processes()[1] * len(flat)
        n, total = n / size, total / size
        self.count.lerp_(n, 1 - self.DECAY)
        if not self.learns_by_loss:
            step = (1 - self.DECAY) * (total - n[:, None] * self.codebook)
            self.codebook.add_(step / self.count.clamp(min=1e-12)[:, None])
        if self.revive:
            mean = 1 / self.n_embeddings
            dead = self.count < self.DEAD * mean
            drawn = self._draw(flat, self.n_embeddings)
            self.codebook.copy_(torch.where(dead[:, None], drawn, self.codebook))
            self.count.masked_fill_(dead, mean)

    def _totals(self, flat, codes):
        n = torch.bincount(codes, minlength=self.n_embeddings).to(flat.dtype)
        total = torch.zeros_like(self.codebook).index_add_(0, codes, flat)
        return over_processes(n), over_processes(total)

    @staticmethod
    def _draw(flat, n):
        """n vectors of those of all processes, the same on each."""
        rank, n_processes = processes()
        places = torch.randint(n_processes * len(flat), (n,), device=flat.device)
        is_here = (places // len(flat) == rank)[:, None]
        return over_processes(torch.where(is_here, flat[places % len(flat)], 0.0))


class VQVAE(nn.Module):
    """Encoder, vector quantiser, decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = VectorQuantizer(
            config.n_embeddings,
            config.embedding_dim,
            config.beta,
            config.codebook,
            config.revive,
            config.diversity,
        )
        self.decoder = Decoder(config)

    def forward(self, x):
        """(B, 1, H, W) -> reconstruction (B, 1, H, W), codes (B, h, w), losses of the quantiser."""
        z_q, codes, losses = self.quantizer(self.encoder(x))
        return self.decoder(z_q), codes, losses

    def encode(self, x):
        """(B, 1, H, W) in [0, 1] -> codes (B, h, w); H and W must be multiples of f."""
        return self.quantizer(self.encoder(x))[1]

    def decode(self, codes):
        """Codes (B, h, w) -> images (B, 1, H, W)."""
        return self.decoder(self.quantizer.lookup(codes))


# ------------------------------------------------------------------------------------------------
# Stage 2: the gated PixelCNN [2]
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelCNNConfig:
    """Architecture of a gated PixelCNN; all that is needed to rebuild it."""

    n_embeddings: int  # K, number of different codes
    size: tuple[int, int]  # (h, w) of the code grid
    n_channels: int = 64
    n_layers: int = 10
    kernel_size: int = 3  # odd; the vertical stack sees (k + 1) / 2 rows of k codes per layer
    dropout: float = 0.1
    n_classes: int = 0  # number of labels; 0 for none
    n_depths: int = 8  # places along a volume between which the atlas of `GatedPixelCNN` is mixed
    mirror: str = "none"  # or "rows", "columns": their second half also sees the first one, flipped
    order: str = "rows"  # or "columns": which of the two follow one another as codes are drawn
    summary: bool = False  # whether each line is told what those before it are like on the whole

    def __post_init__(self):
        object.__setattr__(self, "size", tuple(self.size))
        if self.mirror not in ("none", "rows", "columns"):
            raise ValueError(f"mirror must be 'none', 'rows' or 'columns', not {self.mirror!r}")
        if self.order not in ("rows", "columns"):
            raise ValueError(f"order must be 'rows' or 'columns', not {self.order!r}")
        if self.n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, not {self.n_layers}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")

    @property
    def lines(self):
        """(number of lines, codes in each) as codes are drawn: (h, w), or (w, h) by columns."""
        return self.size if self.order == "rows" else self.size[::-1]


def gate(x):
    """(B, 2C, ...) -> (B, C, ...): tanh(a) * sigmoid(b), [2] eq. 2."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class Dropout(nn.Dropout):
    """Hides the same activations of a batch however many processes share it.

    Their random numbers must begin alike; each draws those of all, and takes its own. On a CPU one
    random word decides on four activations, which takes a third of the time of `nn.Dropout`.
    """

    STEPS = 1 << 15  # of the chance

    def forward(self, x):
        if not self.training or not self.p:
            return x
        rank, n_processes = processes()
        n = n_processes * x.numel()
        if x.device.type == "cpu":
            words = torch.randint(-(2**63), 2**63 - 1, (-(-n // 4),))
            drawn = words.view(torch.int16)[:n] & (self.STEPS - 1)
        else:
            drawn = torch.randint(self.STEPS, (n,), dtype=torch.int16, device=x.device)
        b, c, h, w = x.shape
        own = drawn.chunk(n_processes)[rank].view(b, h, w, c).permute(0, 3, 1, 2)
        n_hidden = min(round(self.p * self.STEPS), self.STEPS - 1)
        return x * ((own >= n_hidden).to(x.dtype) * (self.STEPS / (self.STEPS - n_hidden)))


class GatedLayer(nn.Module):
    """One layer of both stacks, [2] figure 2.

    Neither kernel is masked: each is only as large as what it may see, and the padding puts it
    where it may look. For k = 5, with o the position computed:

        vertical       horizontal
        x x x x x
        x x x x x
        x x o x x      x x o

    The inputs of the first layer are shifted by one (see `GatedPixelCNN.forward`), the vertical
    stack's down and the horizontal stack's to the right, so `o` itself is a code of the past.
    """

    def __init__(self, config):
        super().__init__()
        c, k = config.n_channels, config.kernel_size
        self.reach = k // 2  # rows above and columns to either side that the kernel covers
        self.vertical = nn.Conv2d(c, 2 * c, (self.reach + 1, k))
        self.horizontal = nn.Conv2d(c, 2 * c, (1, self.reach + 1))
        self.down = nn.Conv2d(2 * c, 2 * c, 1)  # what the horizontal stack learns of the rows above
        self.v_out = nn.Conv2d(c, c, 1)
        self.h_out = nn.Conv2d(c, c, 1)
        self.dropout = Dropout(config.dropout)

    def forward(self, v, h, condition):
        """v, h: (B, C, h, w) of each stack; condition: (B, 2C, 1, 1), the V^T h of [2] eq. 4."""
        r = self.reach
        from_above = self.vertical(F.pad(v, (r, r, r, 0)))  # (B, 2C, h, w)
        from_left = self.horizontal(F.pad(h, (r, 0, 0, 0)))
        v = v + self.v_out(self.dropout(gate(from_above + condition)))
        h = h + self.h_out(self.dropout(gate(from_left + self.down(from_above) + condition)))
        return v, h


class Mirror(nn.Sequential):
    """What the first half of the grid, flipped onto the second, says of the codes there.

    A body's left and right are alike, but as codes follow one another they lie far apart: a stack
    of small kernels never learns that one hip is as large as the other.
    """

    REACH = 3  # rows and columns around the mirror image of a place that its kernel covers

    def __init__(self, config):
        c, r = config.n_channels, self.REACH
        self.axis = 2 if config.mirror == config.order else 3
        below = r if self.axis == 2 else 0  # within a line, codes there are not of the past
        super().__init__(
            nn.ZeroPad2d((r, r, r, below)),
            nn.Conv2d(c, c, (r + 1 + below, 2 * r + 1)),
            nn.ReLU(),
            nn.Conv2d(c, c, 1),
        )

    def forward(self, e):
        """Embeddings (B, C, h, w), of which only the first half is read -> (B, C, h, w)."""
        n = e.shape[self.axis]
        if n < 2:
            return torch.zeros_like(e)
        half = super().forward(e.narrow(self.axis, 0, n // 2).flip(self.axis))
        return F.pad(half, (0, 0, n - n // 2, 0) if self.axis == 2 else (n - n // 2, 0))


class Summary(nn.Module):
    """What all lines drawn so far are like, on the whole, told to each code of the next one.

    A slice has one brightness and one contrast. A stack of small kernels sees a few lines, so that
    they fade to the mean as codes follow one another, and all samples look alike. Each head takes a
    mean of its own over the codes so far, weighted by what they are: attention without queries.
    """

    def __init__(self, config):
        super().__init__()
        c = config.n_channels
        self.n_heads = math.gcd(c, 4)
        self.values = nn.Conv2d(c, c, 1)
        self.weights = nn.Conv2d(c, self.n_heads, 1)
        self.inner = nn.Conv2d(c, c, 1)
        self.out = nn.Conv2d(c, c, 1)

    def forward(self, e):
        """Embeddings (B, C, h, w) -> what is told to each line (B, C, h, 1)."""
        return self.told(F.pad(self.of_lines(e).cumsum(2), (0, 0, 1, 0))[:, :, :-1])

    def of_lines(self, e):
        """Embeddings (B, C, h, w) -> sums over each line (B, C + n_heads, h, 1)."""
        weights = self.weights(e).clamp(max=8).exp()
        share = weights.repeat_interleave(e.shape[1] // self.n_heads, 1)
        parts = torch.cat([share * self.values(e), weights], 1)
        return parts.sum(3, keepdim=True, dtype=e.dtype)

    def told(self, sums):
        """Sums over the lines so far (B, C + n_heads, h, 1) -> (B, C, h, 1)."""
        total, weights = sums[:, : -self.n_heads], sums[:, -self.n_heads :]
        share = weights.repeat_interleave(total.shape[1] // self.n_heads, 1)
        return self.out(F.relu(self.inner(total / (share + 1e-3))))


class GatedPixelCNN(nn.Module):
    """p(codes) = prod_i p(code_i | codes above and to the left of i, label, depth), [2] eq. 1, 4.

    Label and depth reach every layer as the bias of [2] eq. 4. Depth, a slice's relative position
    in its volume, also picks from a learned atlas of the grid, a map of C channels for each of
    `n_depths` places along the volume: what lies where depends on the depth above all, and the
    network need not carry that from code to code. With `mirror` the second half of the grid also
    sees the first one, flipped (see `Mirror`); with `summary` each code is told what the lines
    before its own are like on the whole (see `Summary`). With the order "columns" it is the column
    that is drawn code after code: grids are turned on their way in and out, and all that is said of
    rows and columns between holds of the turned grid.
    """

    # Guidance favours no code more: where a code never occurs, whatever label and depth, both
    # logarithms are mostly error, and their difference would draw patches into the air now and then
    MOST_TOLD = 2.0

    def __init__(self, config):
        super().__init__()
        self.config = config
        c = config.n_channels
        vectors = torch.empty(config.n_embeddings, c)
        self.embedding = nn.Embedding.from_pretrained(vectors, freeze=False)
        # the last of each means "any"
        self.atlas = nn.Parameter(torch.empty(config.n_depths + 1, c, *config.lines))
        self.depth = nn.Parameter(torch.empty(config.n_depths + 1, c))
        self.label = nn.Parameter(torch.empty(config.n_classes + 1, c))
        self.conditions = nn.Linear(c, 2 * c * config.n_layers, bias=False)
        self.mirror = None if config.mirror == "none" else Mirror(config)
        self.summary = Summary(config) if config.summary else None
        self.layers = nn.ModuleList(GatedLayer(config) for _ in range(config.n_layers))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(c, 2 * c, 1), nn.ReLU(), nn.Conv2d(2 * c, config.n_embeddings, 1)
        )
        if not self.atlas.is_meta:  # random numbers there import torch's compiler, which takes 2 s
            self._initialise()

    def _initialise(self):
        nn.init.normal_(self.embedding.weight, std=0.5)
        for parameter in (self.atlas, self.depth, self.label):
            nn.init.normal_(parameter, std=0.02)
        if self.mirror is not None:
            nn.init.zeros_(self.mirror[-1].weight)
        if self.summary is not None:
            nn.init.zeros_(self.summary.out.weight)
        for layer in self.layers:
            nn.init.zeros_(layer.v_out.weight)  # each layer starts as the identity
            nn.init.zeros_(layer.h_out.weight)

    @torch.no_grad()
    def start_from(self, codebook):
        """Start embeddings and output weights as random projections of the codebook, plus noise.

        Codes of like patches are then alike from the first update on, instead of after each has
        been seen often enough.

        Args:
            codebook: (K, D) of the VQ-VAE, in the order of the codes.
        """
        e = (codebook - codebook.mean(0)) / codebook.std(0, correction=0).clamp(min=1e-6)  # (K, D)
        for weight in (self.embedding.weight, self.head[-1].weight.flatten(1)):
            projection = torch.randn(e.shape[1], weight.shape[1], device=e.device)
            new = e @ projection / e.shape[1] ** 0.5 + 0.3 * torch.randn_like(weight)
            weight.copy_(new * weight.std())

    def forward(self, codes, label=None, depth=None):
        """Logits of every code given those before it, all at once.

        Args:
            codes: (B, h, w) int64.
            label: (B,) int64 in [0, n_classes); -1 or None means any.
            depth: (B,) relative position in the volume, in [0, 1]; -1 or None means any.
        Returns:
            logits: (B, K, h, w).
        """
        atlas, conditions = self._conditions(len(codes), label, depth)
        is_turned = self.config.order == "columns"
        codes = codes.mT if is_turned else codes
        e = self.embedding(codes).permute(0, 3, 1, 2)  # (B, C, h, w)
        v = F.pad(e, (0, 0, 1, 0))[:, :, :-1] + atlas  # row r holds row r - 1
        h = F.pad(e, (1, 0, 0, 0))[:, :, :, :-1] + atlas  # column c holds column c - 1
        if self.mirror is not None:
            image = self.mirror(e)
            h = h + image
            if self.mirror.axis == 2:  # known before the row begins
                v = v + image
        if self.summary is not None:
            told = self.summary(e)
            v, h = v + told, h + told
        for layer, condition in zip(self.layers, conditions, strict=True):
            v, h = layer(v, h, condition)
        logits = self.head(h)
        return logits.mT if is_turned else logits

    def _conditions(self, n, label, depth):
        """(n,) labels and depths -> the atlas (n, C, h, w), and one (n, 2C, 1, 1) per layer."""
        any_of_n = torch.full((n,), -1, device=self.atlas.device)
        label, depth = (any_of_n if x is None else x for x in (label, depth))
        is_wrong = ~((depth >= 0) & (depth <= 1) | (depth == -1))  # NaN too
        if label.min() < -1 or label.max() >= self.config.n_classes or is_wrong.any():
            raise ValueError(f"labels are below {self.config.n_classes} and depths in [0, 1]")
        last = self.config.n_depths - 1
        places = torch.arange(last + 1, device=depth.device)
        near = (1 - (depth.clamp(min=0)[:, None] * last - places).abs()).clamp(min=0)
        is_known = (depth >= 0)[:, None]
        mix = torch.cat([near * is_known, ~is_known], 1).to(self.atlas.dtype)  # (n, n_depths + 1)
        atlas = torch.einsum("nk,kchw->nchw", mix, self.atlas)
        both = self.label[label] + mix @ self.depth  # -1 is the last label, "any"
        return atlas, self.conditions(both)[:, :, None, None].chunk(self.config.n_layers, 1)

    @torch.no_grad()
    def sample(
        self, n, size=None, label=None, temperature=1.0, top_k=None, given=None, generator=None,
        depth=None, guidance=0.0, progress=None,
    ):
        """Draw n grids of codes, one code after the other (see `logits_in_order`).

        Args:
            n: number of grids.
            size: (h, w); the grid the model was made for when None.
            label: int, or (n,) int64 in [0, n_classes); -1 or None means any.
            temperature: logits are divided by it; 0 takes the likeliest code.
            top_k: draw among the k likeliest codes only.
            given: (n, h, w) int64; codes >= 0 are kept as they are, -1 are drawn, each from what
                precedes it: exact where all lines after some code are to be drawn, else blind to
                what is given further on.
            generator: torch.Generator on the CPU, or a list of n of them, one for each grid, which
                makes a grid independent of the batch it is drawn in.
            depth: float, or (n,), relative position in the volume; -1 or None means any.
            guidance: W of log p(code | label, depth) + W log p(code | label, depth) / p(code), from
                which codes are drawn ([4]), the second logarithm at most `MOST_TOLD`: more than 0
                makes a grid more like its label and depth.
            progress: called with no arguments after each line, `config.lines[0]` times.
        Returns:
            codes: (n, h, w) int64.
        """
        rows, columns = self.config.size
        if size is not None and tuple(size) != (rows, columns):
            raise ValueError(f"this prior draws grids of {(rows, columns)}, not {tuple(size)}")
        if temperature < 0 or guidance < 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"no sampling with temperature {temperature}, top_k {top_k}, guidance {guidance}"
            )
        if given is not None and given.max() >= self.config.n_embeddings:
            raise ValueError(f"given codes must be below {self.config.n_embeddings}")
        device = self.atlas.device
        label, depth = (
            None if x is None else torch.as_tensor(x, device=device).expand(n)
            for x in (label, depth)
        )
        if all(x is None or bool((x == -1).all()) for x in (label, depth)):
            guidance = 0.0  # there is nothing to exaggerate
        uniform = _uniform((rows, columns), n, generator).to(device)
        codes = torch.full((2 if guidance else 1, n, rows, columns), -1, device=device)
        if given is not None:
            codes.copy_(given)
        if guidance:  # the second half of the batch knows neither label nor depth
            label, depth = (
                x if x is None else torch.cat([x, torch.full_like(x, -1)]) for x in (label, depth)
            )
        both = codes.flatten(0, 1)  # a view, which sees what is filled in below
        places = self.logits_in_order(both, label, depth)
        for count, (i, j, logits) in enumerate(places, 1):
            if guidance:
                told, untold = logits.log_softmax(1).chunk(2)
                logits = told + guidance * (told - untold).clamp(max=self.MOST_TOLD)
            here = codes[0, :, i, j]
            drawn = _choose(logits, uniform[:, i, j], temperature, top_k)
            codes[:, :, i, j] = torch.where(here < 0, drawn, here)
            if progress is not None and count % self.config.lines[1] == 0:
                progress()
        return codes[0]

    @torch.no_grad()
    def logits_in_order(self, codes, label=None, depth=None):
        """The logits of `forward`, a position at a time, computing nothing twice [3].

        The vertical stack advances by a row once the row above is known, the horizontal stack by a
        code, each from the few inputs its kernels cover.

        Args:
            codes: (n, h, w) int64; what [:, i, j] is matters only after (i, j) has been yielded,
                so the caller may fill it in meanwhile.
            label, depth: (n,), as in `forward`.
        Yields:
            i, j, logits (n, K).
        """
        is_turned = self.config.order == "columns"
        codes = codes.mT if is_turned else codes  # a view, which sees what the caller fills in
        n, rows, columns = codes.shape
        axis = None if self.mirror is None else self.mirror.axis
        like = {"device": self.atlas.device, "dtype": self.atlas.dtype}
        c, r = self.config.n_channels, self.config.kernel_size // 2
        n_layers = len(self.layers)
        atlas, conditions = self._conditions(n, label, depth)
        # per layer, the vertical stack's last r + 1 input rows; zeros are the padding above row 0
        above = [torch.zeros(n, c, r + 1, columns + 2 * r, **like) for _ in self.layers]
        # per layer, the horizontal stack's inputs of a row, r zeros of padding before them, and
        # views of it: what the kernel covers at each column, and the place of that column; a row
        # overwrites the one before it, and looks at no column before it has
        left = torch.zeros(n_layers + 1, n, (columns + r) * c, **like)
        covered = [left[..., j * c : (j + r + 1) * c].unbind() for j in range(columns)]
        place = [left[..., (j + r) * c : (j + r + 1) * c].unbind() for j in range(columns)]
        half, kernels, outs = self._horizontal_matrices()
        x, gated = torch.empty(n, 2 * c, **like), torch.ones(n, c + 1, **like)
        a, b = x.chunk(2, 1)
        inner = gated[:, :c]  # the last column multiplies the bias
        hidden, last = ((conv.weight.flatten(1), conv.bias) for conv in self.head[1::2])
        previous_row = torch.zeros(n, c, columns, **like)
        if self.summary is not None:
            sums = torch.zeros(n, c + self.summary.n_heads, 1, 1, **like)  # over the rows so far
        for i in range(rows):
            if axis == 2 and i == rows - rows // 2:
                atlas = atlas + self.mirror(self._known(codes))
            known = atlas[:, :, i]  # (n, C, w), beside the codes next to each of this row
            if self.summary is not None:
                known = known + self.summary.told(sums)[:, :, 0]
            v = previous_row + known
            from_above = []  # per layer, what the horizontal stack adds at each column
            for layer, condition, window in zip(self.layers, conditions, above, strict=True):
                window.copy_(window.roll(-1, 2))
                window[:, :, -1, r : r + columns] = v
                y = layer.vertical(window)  # (n, 2C, 1, w)
                bias = layer.horizontal.bias[:, None, None]
                down = (layer.down(y) + condition + bias)[:, :, 0] * half[:, None]
                from_above.append(down.permute(2, 0, 1).contiguous().unbind())
                v = v + layer.v_out(gate(y + condition))[:, :, 0]
            code_left = torch.zeros(n, c, **like)
            for j in range(columns):
                if axis == 3 and j == columns - columns // 2:
                    rows_above = codes[:, max(0, i - Mirror.REACH) : i + 1]
                    known = known + self.mirror(self._known(rows_above))[:, :, -1]
                torch.add(code_left, known[:, :, j], out=place[j][0])
                for k in range(n_layers):
                    torch.addmm(from_above[k][j], covered[j][k], kernels[k], out=x)
                    x.tanh_()
                    torch.addcmul(a, a, b, out=inner)
                    torch.addmm(place[j][k], gated, outs[k], out=place[j][k + 1])
                h = F.relu(place[j][-1])
                place_in_slice = (j, i) if is_turned else (i, j)
                yield *place_in_slice, F.linear(F.relu(F.linear(h, *hidden)), *last)  # self.head
                code_left = self.embedding(codes[:, i, j])
            previous_row = self.embedding(codes[:, i]).transpose(1, 2)
            if self.summary is not None:
                sums = sums + self.summary.of_lines(previous_row[:, :, None])

    def _known(self, codes):
        """(n, h, w) codes, anything where not drawn yet -> embeddings (n, C, h, w)."""
        known = codes.clamp(0, self.config.n_embeddings - 1)
        return self.embedding(known).permute(0, 3, 1, 2)

    def _horizontal_matrices(self):
        """The horizontal stack's weights for `logits_in_order`, where one tanh does for a gate.

        sigmoid(b) = (1 + tanh(b / 2)) / 2, so what leads to b is halved, and what follows too.

        Returns:
            half: (2C,), 1 for each a of a gate and 1/2 for each b.
            kernels: per layer, ((r + 1) C, 2C); outs: per layer, (C + 1, C), the bias last.
        """
        half = torch.ones(2 * self.config.n_channels).to(self.atlas)
        half[self.config.n_channels :] = 0.5
        kernels, outs = [], []
        for layer in self.layers:
            kernel = layer.horizontal.weight[:, :, 0].permute(2, 1, 0).flatten(0, 1)
            kernels.append((kernel * half).contiguous())
            weight = layer.h_out.weight.flatten(1).t()
            outs.append(torch.cat([0.5 * weight, layer.h_out.bias[None]]))
        return half, kernels, outs


def _uniform(size, n, generator):
    """(n, *size) numbers in [0, 1), those of grid i from the i-th generator if there are many."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([torch.rand(size, generator=g) for g in generator])
    return torch.rand((n, *size), generator=generator)


def _choose(logits, uniform, temperature, top_k):
    """(n, K) logits, (n,) uniform numbers -> (n,) codes: inverts the cumulative distribution."""
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(1)
    logits = logits.float()
    logits = (logits - logits.amax(1, keepdim=True)) / temperature  # finite however cold
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, 1).values[:, -1:], -torch.inf)
    cumulative = logits.softmax(1).cumsum(1)
    total = cumulative[:, -1:]  # 1 up to rounding only
    threshold = torch.minimum(uniform[:, None] * total, total.nextafter(total.new_zeros(())))
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]
