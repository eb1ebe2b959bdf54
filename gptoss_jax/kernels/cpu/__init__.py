"""Products on CPUs: MXFP4, bfloat16 and float32 weights, by AVX-512, AVX2 or plain vectors."""

from gptoss_jax.kernels.cpu import training as training
from gptoss_jax.kernels.cpu.attention import HEAD_BLOCK as HEAD_BLOCK
from gptoss_jax.kernels.cpu.attention import attention as attention
from gptoss_jax.kernels.cpu.attention import attention_and_norm as attention_and_norm
from gptoss_jax.kernels.cpu.attention import attention_gradient as attention_gradient
from gptoss_jax.kernels.cpu.compact import CompactMatrix as CompactMatrix
from gptoss_jax.kernels.cpu.compact import as_compact as as_compact
from gptoss_jax.kernels.cpu.compact import compact_matrices as compact_matrices
from gptoss_jax.kernels.cpu.compact import compact_product as compact_product
from gptoss_jax.kernels.cpu.experts import CpuExperts as CpuExperts
from gptoss_jax.kernels.cpu.experts import as_cpu_experts as as_cpu_experts
from gptoss_jax.kernels.cpu.library import why_not as why_not
from gptoss_jax.kernels.cpu.low_rank import add_low_rank as add_low_rank
from gptoss_jax.kernels.cpu.low_rank import add_low_rank_gradient as add_low_rank_gradient
from gptoss_jax.kernels.cpu.products import grouped_product as grouped_product
from gptoss_jax.kernels.cpu.products import grouped_product_transposed as grouped_product_transposed
from gptoss_jax.kernels.cpu.rows import store_rows as store_rows
from gptoss_jax.kernels.cpu.rows import table_rows as table_rows
