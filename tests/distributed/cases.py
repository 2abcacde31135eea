"""The layouts that are compared with one process: models, batches, one step's gradients. Used on both sides."""

import dataclasses
from importlib.util import find_spec

import torch
from objective import fractions, objective, sum_over_layers

from sigmoe.kernels.backend import TORCH, Backends
from sigmoe.moe.batch import IGNORED, Batch
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.initialize import draw
from sigmoe.moe.route_table import fill_route_tables
from sigmoe.moe.routing import TrainingPass
from sigmoe.parallel.layout import place_experts

NAMES = ("a", "b", "c")
SEQUENCES, LENGTH, VOCAB = 8, 11, 37

GLOBAL = RouterConfig(name="top_k", num_experts=5, z_loss=1e-2, auxiliary_loss=0.1)
DOMAIN = RouterConfig(name="domain_top_k", sets={"a": (0, 1, 2), "b": (2, 3, 4, 5), "c": (6, 7)}, auxiliary_loss=0.1)
TABLE = RouterConfig(name="rre", sets={"a": 2, "b": 3, "c": 1}, top_k=1, balance="none")
BIAS = RouterConfig(name="top_k", num_experts=5, balance="bias", top_k=3)

CAPACITY = {"capacity_factor": 0.7}
BATCH = {"balance_scope": "batch", "jitter": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A layout of a model; the same model and batch in one process is what it must equal."""

    world: int
    router: RouterConfig
    tp: int = 1
    ep: int = 1
    etp: int | None = None
    micro: int = 2
    recompute: str = "none"
    changes: dict = dataclasses.field(default_factory=dict)
    unlabelled: tuple[int, ...] = ()  # sequences without a label
    wide: bool = False  # float64 parameters and activations (gates stay fp32)
    backends: Backends = TORCH  # of the layout; the one process computes with torch

    @property
    def name(self):
        extra = "-".join(f"{key}={value}" for key, value in self.changes.items())
        layout = f"dp{self.world // self.tp}tp{self.tp}ep{self.ep}etp{self.etp or self.tp}"
        router = self.router
        kind = f"{router.name}{router.top_k}-{router.balance}-{router.balance_scope}-{router.capacity_factor}"
        marks = f"{self.recompute}{'-padding' * bool(self.unlabelled)}{'-wide' * self.wide}"
        marks += "-triton" * (self.backends != TORCH)
        return f"{layout}-{kind}-micro{self.micro}-{marks}-{extra}"

    @property
    def config(self):
        shape = {"vocab_size": VOCAB, "dim": 18, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "head_dim": 4}
        shape |= {"expert_dim": 12, "ffn_dim": 8, "sparse_layers": "upper:2", "init_std": 0.1}
        return ModelConfig(**{**shape, "router": self.router, **self.changes})

    @property
    def model_key(self):
        """What the single process depends on."""
        return repr((self.config, self.unlabelled, self.wide))


def batch(case):
    """Sequences of all domains with several documents; some tokens, and some sequences, have no label.

    Low ids are frequent and the seed was searched for, so that gradients do not cancel down to fp32's noise (one
    process's own distance from float64 is then 4e-7 to 7e-7) and no gate is near a tie.
    """
    random = torch.Generator().manual_seed(13)
    token_BS = (VOCAB * torch.rand((SEQUENCES, LENGTH), generator=random) ** 4).long()
    label_BS = token_BS.roll(-1, 1)
    label_BS[torch.rand(token_BS.shape, generator=random) < 0.2] = IGNORED
    label_BS[list(case.unlabelled)] = IGNORED
    start_BS = torch.tensor([0] * 4 + [4] * 7).repeat(SEQUENCES, 1)
    start_BS[::3] = 0
    domain_B = torch.tensor([0, 1, 2, 1, 0, 0, 2, 1])
    return Batch(
        token_BS=token_BS,
        label_BS=label_BS,
        start_BS=start_BS,
        domain_B=domain_B,
        sample_B=torch.arange(SEQUENCES) + 40,
    )


def perturb(config, name, value):
    """Make norms and biases matter: from 1 and 0 to something drawn by name."""
    if name.endswith("norm.weight"):
        return value + draw(name, tuple(value.shape), 0.3, 1)
    if name.endswith("e_score_correction_bias"):
        bias = draw(name, tuple(value.shape), 0.2, 1)
        bias[0] = -10  # nobody chooses expert 0
        return bias
    return value


def finish(case, model):
    """Route tables and dtype, the same on all sides."""
    counts = {name: torch.arange(VOCAB) * (row + 1) for row, name in enumerate(NAMES)}
    fill_route_tables(model, counts, seed=3)
    return model.double() if case.wide else model


def step(case, model, registry, micros, labels):
    """Add the gradients of the micro-batches; return sums of loss and stats over them."""
    config, tokens = case.config, SEQUENCES * LENGTH
    training = TrainingPass(seed=1, step=2, fractions=fractions(config, registry))
    sums = {"loss": 0.0, "token_loss": 0.0, "balance": 0.0, "z": 0.0, "dropped": 0}
    counts = dict.fromkeys(config.sparse_layer_ids, 0)
    for micro in micros:
        loss, output = objective(model, micro, training, labels, tokens)
        loss.backward()
        sums["loss"] += float(loss.detach())
        sums["token_loss"] += float(output.loss_BS.double().sum())
        sums["balance"] += float(sum_over_layers(output, "balance_sum").detach())
        sums["z"] += float(sum_over_layers(output, "z_sum").detach())
        sums["dropped"] += sum(int(stats.dropped) for stats in output.stats)
        for stats in output.stats:
            counts[stats.layer] += stats.count_BE.sum(0)
    return sums, {str(layer): count.tolist() for layer, count in counts.items()}


def _pairs(world, **layout):
    """Every router, each with other settings, on one layout."""
    replace = dataclasses.replace
    yield Case(world=world, router=replace(GLOBAL, **CAPACITY), **layout)
    yield Case(world=world, router=replace(GLOBAL, **BATCH), micro=1, recompute="layer", **layout)
    yield Case(world=world, router=DOMAIN, changes={"qk_norm": "head", "sliding_window": 3}, **layout)
    yield Case(
        world=world, router=replace(DOMAIN, **BATCH, **CAPACITY), recompute="experts",
        changes={"qk_norm": "width", "tie_embeddings": True}, **layout,
    )  # fmt: skip
    yield Case(world=world, router=TABLE, changes={"embedding_slots": {"a": 0, "b": 1, "c": 1}}, **layout)
    yield Case(
        world=world, router=BIAS, recompute="attention", unlabelled=(0, 1, 4, 5),
        changes={"qk_norm": "width"}, **layout,
    )  # fmt: skip
    yield Case(world=world, router=DOMAIN, wide=True, changes={"sparse_layers": "every:2"}, **layout)


LAYOUTS = {
    2: [{"tp": 2}, {"ep": 2}, {"tp": 2, "ep": 2, "etp": 1}, {"tp": 2, "etp": 1}, {}],
    4: [
        {"tp": 2, "ep": 2},
        {"tp": 2, "ep": 2, "etp": 1},
        {"tp": 4, "ep": 4, "etp": 1},
        {"tp": 4, "ep": 1},
        {"tp": 2, "ep": 1},
        {"tp": 2, "ep": 4, "etp": 1},
        {"ep": 2},
        {"ep": 4},
    ],
}


# All Triton kernels: with experts apart and a capacity that drops pairs, and with everything cut by tensor ranks.
_EVERY = Backends(**dict.fromkeys((field.name for field in dataclasses.fields(Backends)), "triton"))
TRITON = [
    Case(
        world=2,
        micro=4,
        router=dataclasses.replace(GLOBAL, **CAPACITY),
        changes={"dim": 48, "expert_dim": 32, **changes},  # of the experts here a multiple of 16; no gate near a tie
        backends=_EVERY,
        **layout,
    )
    for layout, changes in (({"ep": 2}, {}), ({"tp": 2}, {"qk_norm": "head", "sliding_window": 3}))
]


def cases(world, everything):
    """Cases of a world size: `everything`, or of each layout some, so that each kind of model meets most layouts.

    Layouts that leave a rank without an expert are left out.
    """
    found = []
    for number, layout in enumerate(LAYOUTS[world]):
        fitting = [case for case in _pairs(world, **layout) if fits(case)]
        some = sorted({(number + shift) % len(fitting) for shift in (0, 2, 5)})
        found += fitting if everything else [fitting[place] for place in some]
    return found + [case for case in TRITON if case.world == world and find_spec("triton") is not None]


def fits(case):
    """Whether every expert rank has an expert, as `check_layout` demands."""
    registry = case.config.build_registry(NAMES)
    layers = range(len(case.config.sparse_layer_ids))
    return all(all(place_experts(registry.sets(layer), case.ep)) for layer in layers)
