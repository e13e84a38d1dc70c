"""mask_tokens: choose the tokens that the generator predicts, on real ids."""

from benchmarks.harness.cases import BYTES, Call, cases


@cases(value=40)
def bench_mask_tokens(make):
    ids, key_mask, _ = make.batch()
    args = {"ids": ids, "candidates": make.candidates(ids), "rng": make.rng, "key_mask": key_mask}
    slots = make.B * round(make.L * make.config.mask_prob)
    return Call(
        args | {"mask_id": make.config.mask_id, "mask_prob": make.config.mask_prob},
        unit=BYTES,
        # read ids and two masks; write ids, and position, target and weight of each slot
        forward=2 * ids.nbytes + 2 * key_mask.nbytes + slots * 20,
    )
