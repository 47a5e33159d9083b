"""What a model knows and how well it predicts. May import models and data.

`questions` reads question files, `recall` asks them, `loss` measures text and prepared tokens,
`lm_eval_adapter` runs published benchmarks, `report` holds the figures. `memory` asks one decoder
in every format of knowledge, `knowledge` sorts facts by what can stand in for knowing them.
`scoring`, `documents` and `facts` are what they stand on.

`benchmarks` names the published ones (their task files are in `tasks/`, what these do to rows in
`task_rows`), `task_runs` asks them with and without memory and goes on where it was interrupted
(`response_log`), `memory_lm` is the harness's model with a bank (`question_references` finds,
`bank_reading` reads), `task_table` and `effective_size` say what came out.
"""
