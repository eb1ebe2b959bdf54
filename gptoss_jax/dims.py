"""The alphabet: one letter for each axis, used as suffix, einsum subscript, parameter metadata and
sharding key.

Knows sizes only through a config's numbers; knows no arrays, no files, no meshes.

    B batch            N query heads          E experts
    T tokens, this call K kv heads             X experts a token
    S cache slots      G query heads a kv head F expert hidden
    D hidden           H head size            P the (gate, up) pair, 2
    V vocabulary       R LoRA rank            M rows after dispatch
    U MXFP4 blocks along the contracted axis  Y packed bytes a block, 16

gpt-oss hides transpositions (D = F = 2880, N = H = 64, K = G = 8): the test config has every letter
of another size.
"""

from gptoss_jax.config import GptOssConfig

LETTERS = "BTSDVNKGHEXFPMRUY"


def sizes(config: GptOssConfig) -> dict[str, int]:
    """Sizes of the letters that a config fixes."""
    return {
        "D": config.hidden_size,
        "V": config.vocab_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "G": config.num_heads // config.num_kv_heads,
        "H": config.head_dim,
        "E": config.num_experts,
        "X": config.experts_per_token,
        "F": config.intermediate_size,
        "P": 2,
        "Y": 16,
    }


def shape(letters: str, config: GptOssConfig) -> tuple[int, ...]:
    """Shape of an array whose axes are `letters`, for example shape("NHD", config) = (64, 64,
    2880).
    """
    known = sizes(config)
    return tuple(known[letter] for letter in letters)
