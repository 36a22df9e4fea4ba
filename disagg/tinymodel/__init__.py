"""The bundled model: its data generator, tokenizer, training script and evaluation.

No weights can be downloaded where the project must run, so a small Llama is trained from a seed on a
CPU and shipped in ``disagg/assets/tiny``. Its tasks have answers that can be checked, and they fail
visibly when a single block of the KV cache is wrong.
"""
