"""`textdiffusion compare`: several families on the same text, tokenizer, network and budget, on one page.

plan.py says what is compared, driving.py trains and measures it, measuring.py, judging.py and gaming.py are the
figures, differences.py holds two results against each other, verdict.py says which family to take, and figures.py and
page.py show it.
"""
