"""What a model knows and how well it predicts. May import models and data.

`questions` reads question files, `recall` asks them, `loss` measures text and prepared tokens,
`lm_eval_adapter` runs published benchmarks, `report` holds the figures. `memory` asks one decoder
in every format of knowledge, `knowledge` sorts facts by what can stand in for knowing them.
`scoring`, `documents` and `facts` are what they stand on.
"""
