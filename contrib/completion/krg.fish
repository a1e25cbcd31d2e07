# fish completion for krg(1): to ~/.config/fish/completions/krg.fish
_KRG_COMPLETE=fish_source krg | source
