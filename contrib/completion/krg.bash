# bash completion for krg(1): to /usr/share/bash-completion/completions/krg, or sourced in ~/.bashrc
eval "$(_KRG_COMPLETE=bash_source krg)"
