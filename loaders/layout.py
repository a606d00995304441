"""Names of the files in a checkpoint's folder."""

CONFIG = "config.json"
GENERATION = "generation_config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
POLICY = "policy.yaml"
BLOCKS = "perparam.blocks"
"""Key in the metadata of a safetensors file: the blocks of its scaled pairs, as JSON by name."""
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
