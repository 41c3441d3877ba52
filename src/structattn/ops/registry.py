"""List the backends, best first, and choose among them."""

from __future__ import annotations

from dataclasses import dataclass

from structattn import checks
from structattn.ops import cpu, reference, tiled, triton
from structattn.ops.call import Backend, Call

# In order of preference: "auto" takes the first that serves a call.
REGISTRY: dict[str, Backend] = {
    "cpu": cpu,
    "triton": triton,
    "tiled": tiled,
    "reference": reference,
}


@dataclass(frozen=True)
class BackendStatus:
    """Backend and the reason against it, if any, for machine or call."""

    name: str
    reason: str | None

    @property
    def eligible(self) -> bool:
        """True if there is no reason against it."""
        return self.reason is None

    def __str__(self) -> str:
        return f"{self.name}: {'eligible' if self.eligible else self.reason}"


def backends(call: Call | None = None) -> list[BackendStatus]:
    """Return every backend's status for `call` or for this machine, best first."""
    return [BackendStatus(name, backend.ineligible(call)) for name, backend in REGISTRY.items()]


def check_name(name: str) -> str:
    """Return `name` if it is `"auto"` or a backend's name.

    Raises:
        ValueError: it is neither; the message has the known names.
    """
    return checks.one_of("backend", name, ["auto", *REGISTRY])


def choose(name: str, call: Call) -> Backend:
    """Return the named backend, or for `"auto"` the first that serves.

    Raises:
        ValueError: the named backend cannot serve the call; the message says why.
    """
    if name == "auto":
        # On a CPU Triton means its interpreter, which is for tests: only by name.
        names = (each for each in REGISTRY if each != "triton" or call.query.is_cuda)
        return REGISTRY[next(each for each in names if REGISTRY[each].ineligible(call) is None)]
    reason = REGISTRY[check_name(name)].ineligible(call)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot serve this call: {reason}")
    return REGISTRY[name]
