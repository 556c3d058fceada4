"""Compose recipes: from YAML and overrides to plugins, or to everything that is wrong with them.

`compose` goes through the steps of Hydra, in this order:

    overrides   parse and refuse what was typed
    library     find recipes, presets and plugins, and serve them to Hydra
    defaults    read one file: its values, and its list of choices
    source      read YAML as data and nothing else, with the line of each key
    choosing    settle the list of configs
    judging     judge what is left of a recipe with mistakes
    mistakes    note what is wrong, and say it
"""
