"""Where others win: every case and provider that is faster than `fused`, and the reason if it is known."""

from typing import NamedTuple

from benchmarks.report.runs import groups, is_plain, kind, spread, times_fused

WHY = {
    ("cpu", "add_norm"): "its backward pass makes the sum again, which pays where there is dropout; "
    "on a CPU ops are timed without",
    ("cpu", "host"): "Triton's kernels are called from Python, a third of this time",
    ("cpu", "infer"): "transformers' modules and our checks are Python, 1 to 2 ms of a call",
}
OF_OURS = {
    "packed": "one of ours: fused without padding",
    "eager": "one of ours: fused without a graph",
    "fused_int8": "one of ours: fused in int8",
    "fused_graph": "one of ours: fused as a CUDA graph",
    "packed_graph": "one of ours: without padding, as a CUDA graph",
    "pipeline_patched": "one of ours: patched",
    "trainer_packed": "one of ours: patched, without padding",
    "trainer_patched": "one of ours: patched",
    "electra": "one of ours: another objective",
}


class Comparison(NamedTuple):
    """A provider compared with `fused`: `ratio` is its time over that of fused in the same rounds."""

    group: str
    provider: str
    ratio: float
    spread: tuple[float, float] | None
    seconds: float
    why: str


def comparisons(result: dict) -> list[Comparison]:
    """Return every provider that was timed together with `fused`."""
    found = []
    for group, providers in groups(result).items():
        for provider, benchmark in providers.items():
            if isinstance(benchmark, str) or times_fused(benchmark) is None:
                continue
            ratio, seconds = times_fused(benchmark), benchmark["stats"]["median"]
            reason = why(result, group, provider, providers["fused"], spread(benchmark))
            found.append(Comparison(group, provider, ratio, spread(benchmark), seconds, reason))
    return found


def losses(result: dict) -> list[Comparison]:
    return sorted((c for c in comparisons(result) if c.ratio < 1), key=lambda c: c.ratio)


def why(result: dict, group: str, provider: str, fused: dict, between: tuple[float, float] | None) -> str:
    if provider in OF_OURS:
        return OF_OURS[provider]
    if is_plain(fused):
        return "no kernel here: fused is plain PyTorch after the op's checks"
    if between and between[0] < 1 < between[1]:
        return "within the spread of the rounds"
    return WHY.get((kind(result), group.split(", ")[0]), "not known")
