"""
Under report.py and ablate.py:

    history       run folders as plain data
    alarm         reference curves with bands, and whether a run lies within
    page, charts  the report as one HTML file, with page.html
    pictures      reports as PNG
    experiment    an ablation's file: its variants, seeds and budget, and the hash of the code that trains
    tables        an ablation's results, as tables
    significance  what is more than noise
    isoflop       the best size for a budget of compute
"""
