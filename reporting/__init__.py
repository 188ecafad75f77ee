"""
Under report.py and ablate.py:

    history  run folders as plain data
    tables   an ablation's results: what is more than noise
    isoflop  the best size for a budget of compute
    alarm    reference curves with bands, and whether a run lies within
    page     the report as one HTML file, with page.html
"""
