"""What the scripts are made of, by the study that it belongs to.

=================================  ===========================================================================
all                                cli, studies, machine, measuring, caching, nowcasters
what is trained, on what           task, images, text, modules, sizes
``evaluate_speedup.py``            speedup
``fair_table.py``                  fair_*
``measure_steps_saved.py``         branches, branch_report
``post_training.py``               post_*
``collect_trajectories.py``        runs, ensembles
``benchmark_*.py``                 overhead, trainings, heads, published
``check_*.py``                     architectures, wired_blocks, wired_zoo
``metanet_*.py``                   zoo, zoo_models, sirens, stacked, nfn_nets, rivals
=================================  ===========================================================================
"""
