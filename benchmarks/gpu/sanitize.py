"""Run a small example of an op, forward and backward, with each of its kernels, under compute-sanitizer.

compute-sanitizer --error-exitcode 9 python -m benchmarks.gpu.sanitize add_norm
"""

import sys


def main(op: str) -> int:
    import torch

    from electra_fast import testing

    testing.interpret()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    examples = [e for e in testing.examples(op, 0) if "no " not in e.name and "none" not in e.name]
    example = next((e for e in examples if "bfloat16" in e.name), examples[0]).to(device=device)
    for name, function in testing.implementations(op, device).items():
        if name != "reference":
            testing.run(function, example)
            print(f"{op}, {name}: {example.name} ran")
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
