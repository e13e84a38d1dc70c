"""Triton kernels and their launchers, one file per op. Imported as ``electra_fast.kernels``."""

if __name__ != "electra_fast.kernels":  # a bare ``import kernels`` from the repository's root

    def __getattr__(name: str):
        # No error at import: transformers imports any "kernels" as Hugging Face's and reads its __version__.
        # If that is missing, it continues without the package.
        error = AttributeError if name.startswith("__") else ImportError
        raise error("this folder is the package 'electra_fast.kernels'; it is not Hugging Face's 'kernels'")
