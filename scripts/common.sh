# What train.sh and slurm_train.sh share; sourced in the project's root. They define `usage`.
# shellcheck shell=sh
# shellcheck disable=SC2154,SC2034 # the scripts set dataset, method, exp and split, and use what is set here

wrong() { # usage and one error line
    usage >&2
    printf 'error: %s\n' "$*" >&2
    exit 2
}

variables() { # for usage
    cat <<TEXT
variables, from the environment or the top of the script:
  dataset    a file configs/DATASET.yaml (default pascal)
  method     unimatch (default), unimatch_v2, fixmatch or supervised
  exp        a name for the experiment (default r101)
  split      a folder splits/DATASET/SPLIT (default 732)
  config, labeled, unlabeled
             paths, from the project's root, in place of those that follow from dataset and split
  double_batch=0
             supervised on the config's batch_size, not on the published baseline's double of it
  PYTHON     an interpreter that has torch
Results are saved in exp/DATASET/METHOD/EXP/SPLIT.
TEXT
}

check_number() { # <name> <value>
    case $2 in
        '') wrong "$1 is missing" ;;
        *[!0-9]* | 0* | ??????*) wrong "$1 must be a positive number, not '$2'" ;;
    esac
}

names() { # the last parts of the paths, without .yaml
    for name in "$@"; do
        name=${name%/}
        name=${name##*/}
        printf ' %s' "${name%.yaml}"
    done
}

check_run() { # sets config, labeled, double and save
    case $method in
        unimatch | unimatch_v2 | fixmatch | supervised) ;;
        *) wrong "method=$method: no such method; choose one of: unimatch unimatch_v2 fixmatch supervised" ;;
    esac

    if [ -n "${config:-}" ]; then
        [ -f "$config" ] || wrong "config=$config: no such file (from $PWD)"
    else
        config=configs/$dataset.yaml
        [ -f "$config" ] ||
            wrong "dataset=$dataset: no file $config; choose one of:$(names configs/*.yaml), or set config=PATH"
    fi

    if [ -n "${labeled:-}" ]; then
        [ -f "$labeled" ] || wrong "labeled=$labeled: no such file (from $PWD)"
    elif [ "$dataset" = toy ]; then
        labeled=data/toy/labeled.txt
        [ -f "$labeled" ] ||
            wrong "$labeled: no such file; make the toy set first: python -m scripts.make_toy --root data/toy"
    else
        labeled=splits/$dataset/$split/labeled.txt
        if [ ! -f "$labeled" ] && [ -d "splits/$dataset" ]; then
            wrong "split=$split: no file $labeled; choose one of:$(names "splits/$dataset"/*/), or set labeled=PATH"
        elif [ ! -f "$labeled" ]; then
            wrong "$labeled: no such file; name the list of labelled images: labeled=PATH"
        fi
    fi

    # The published baseline fills the unlabelled half of each batch with labelled images too.
    double=
    if [ "$method" = supervised ] && [ "${double_batch:-1}" != 0 ]; then
        double=yes
    fi
    save=exp/$dataset/$method/$exp/$split
}

find_python() { # sets PYTHON, unless set, to the first interpreter that has torch
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || wrong "PYTHON=$PYTHON: no such program (from $PWD)"
        return
    fi
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then # an active environment comes before .venv
        set -- python .venv/bin/python python3
    else
        set -- .venv/bin/python python python3
    fi
    for PYTHON in "$@"; do
        if "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
            return
        fi
    done
    wrong "no Python with torch found; run sh scripts/setup_env.sh, or name an interpreter: PYTHON=PATH"
}

wait_for() { # <process> <signals ...>: sets status to its exit status; the signals are passed on to it
    process=$1
    shift
    for signal in "$@"; do
        # shellcheck disable=SC2064 # the values of now
        trap "kill -$signal $process 2>/dev/null" "$signal"
    done
    status=0
    wait "$process" || status=$?
    while kill -0 "$process" 2>/dev/null; do # a signal ended the waiting, not the process
        status=0
        wait "$process" || status=$?
    done
}
