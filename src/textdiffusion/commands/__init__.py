"""The command line: flags.py says what there is, cli.py does it; the verbs with more to do have files of their own."""
