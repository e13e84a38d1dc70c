"""Triton kernels and their launchers, one file an op. Imported as ``electra_fast.kernels``."""

if __name__ != "electra_fast.kernels":  # a bare ``import kernels`` from the repository's root

    def __getattr__(name: str):
        # Not an error at import: transformers imports what it takes for Hugging Face's package, and
        # asks for its __version__. No version, and it goes on without.
        error = AttributeError if name.startswith("__") else ImportError
        raise error("this folder is the package 'electra_fast.kernels'; it is not Hugging Face's 'kernels'")
