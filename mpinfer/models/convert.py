"""Turn a GGUF file into the directory that mpinfer loads: config, tokenizer, safetensors."""

from pathlib import Path

from mpinfer.errors import ModelError, OutputError


def convert(source: Path, destination: Path) -> None:
    """Dequantize a GGUF file to float32 with transformers' reader and save it. Needs the `gguf` extra.

    Raises `ModelError` when the source is no GGUF file that transformers can read, `OutputError` when the
    destination exists and is not empty.
    """
    if not source.is_file() or source.suffix != ".gguf":
        raise ModelError(f"{source}: not a .gguf file; give the path of one")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise OutputError(f"{destination}: exists and is not empty; remove it or choose another directory")
    try:
        import accelerate  # noqa: F401  (transformers' GGUF reader asks for it)
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError(f"{source}: reading GGUF needs {error.name}; pip install 'mpinfer[gguf]'") from None
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    except Exception as error:
        raise ModelError(f"{source}: transformers cannot read it ({error}); fetch the file again") from None
    # A model loaded from GGUF refuses to be saved as it is: give its weights to a fresh one without that mark.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    partial = destination.with_name(destination.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors are written for their owner alone; models are shared
    if destination.exists():
        destination.rmdir()
    partial.rename(destination)
