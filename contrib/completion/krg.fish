# fish completion for krg(1): to ~/.config/fish/completions/krg.fish
# (click's function would cut a description at its first comma)
_KRG_COMPLETE=fish_source krg | string replace 'string split ","' 'string split -m 1 ","' | source
