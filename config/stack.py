# The architecture and optimizer that docs/report.md finds best, with the two parts that docs/log.md adds on 2026-11-28
# (init_std, muon_even_rows), to put over any configuration. The stack before is _stack of
# config/ablations/architecture.py.
#     python train.py config/owt_124m.py config/stack.py --out_dir=out/owt_124m_stack
pos = "rope"
norm = "rmsnorm_nogain"
norm_embed = True
qk_norm = "rms"
activation = "relu2"
tie_weights = False
bias = False
zero_init = True
init_std = 0.0          # 1 / sqrt(inputs)

optimizer = "muon"      # has a learning rate of its own: muon_learning_rate
muon_dtype = "auto"
muon_even_rows = True
