# remote.sh - what the tests of the remote tier share: servers on free ports of the loopback, ended with the test, and
# the cases that every kind of remote has to pass.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
trap 'stop_all; rm -rf "$work"' EXIT
unset http_proxy HTTP_PROXY all_proxy ALL_PROXY "${!AWS_@}" REDISCLI_AUTH

pids=()
stop_all() {
    local pid
    for pid in "${pids[@]}"; do
        kill -9 "$pid" 2>/dev/null && wait "$pid" 2>/dev/null
    done
    pids=()
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

wait_for() { # COMMAND...: until it succeeds, for a minute at most
    local left=600
    while [ $((left--)) -gt 0 ]; do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    fail "not ready within a minute: $*"
}

machines() { # NAME...: new stores
    local name
    for name; do
        rm -rf "$name"
        run 0 xkv-store init "$name"
    done
}

make_ggsq tokens=700 >a
make_ggsq tokens=600 >part
make_ggsq tokens=12000 >large # its entry is larger than a piece of 1 MiB
echo secret >salt
echo other >salt2
head -c 32 /dev/urandom >key
run 0 xkv-train -q -o d.xkvd a part

# What one machine has put, others find: the whole, the longest prefix, to the token; and restore it byte for byte.
check_sharing() { # URL
    machines A B C
    run 0 xkv-store put --remote "$1" A a
    out_is 'a: stored as 1, 700 tokens, SIZE'
    run 0 xkv-store get -v -o back --remote "$1" B a
    err_has '^xkv-store: B: stored an entry from the remote'
    same a back
    rm back
    run 0 xkv-store verify --decode B
    run 0 xkv-store match -v --remote "$1" B a # it is here now
    err_is ''
    run 0 xkv-store match --remote "$1" C part
    out_is '600 of 600 tokens, entry 1 of 700 tokens, SIZE'
    machines C
    (od -An -v -tu4 -j 12 -N 2600 a; seq 300) >prompt # 650 of its tokens, and others
    run 0 xkv-store match --remote "$1" C prompt
    out_is '650 of 950 tokens, entry 1 of 700 tokens, SIZE'
    run 7 xkv-store match --remote "$1" C 1,2,3
}

check_large() { # URL
    machines A B
    run 0 xkv-store put -q --remote "$1" A large
    run 0 xkv-store get -q -o back --remote "$1" B large
    same large back
    rm back
}

# An entry brings its dictionary along.
check_dictionary() { # URL
    machines A B
    run 0 xkv-store put -q --remote "$1" -D d.xkvd --ratio 3 A part
    run 0 xkv-store get -q -o there A part
    run 0 xkv-store get -q -o here --remote "$1" B part
    same there here
    run 0 xkv-store stat B
    out_has '^  dictionaries +1$'
    rm here there
}

# An entry that extends another brings that one along, unless it is there.
check_line() { # URL
    machines A B C
    run 0 xkv-store put -q --remote "$1" A part
    run 0 xkv-store put --remote "$1" A a
    out_is 'a: stored as 2, 700 tokens, SIZE behind 512 tokens of 1'
    run 0 xkv-store get -q -o back --remote "$1" B a
    same a back
    run 0 xkv-store stat B
    out_has '^  entries +2$'
    run 0 xkv-store verify -q --decode B
    rm back
    run 0 xkv-store put -q C part
    run 0 xkv-store get -q -o back --remote "$1" C a
    same a back
    run 0 xkv-store ls C
    out_has ' 512 of 1 *$'
    rm back
}

check_tenants() { # URL
    machines A B
    run 0 xkv-store put -q --remote "$1" --salt-file salt A part
    run 7 xkv-store match -q --remote "$1" --salt-file salt2 B part
    run 7 xkv-store match -q --remote "$1" --lora x B part
    run 0 xkv-store stat B
    out_has '^  entries +0$'
    run 0 xkv-store match -q --remote "$1" --salt-file salt B part
}

# Encrypted stores share with those that have the key.
check_encryption() { # URL
    machines B
    rm -rf A C
    run 0 xkv-store init --key-file key A
    run 0 xkv-store init --key-file key C
    run 0 xkv-store put -q --settings sealed --remote "$1" --key-file key A part
    run 7 xkv-store match -q --settings sealed --remote "$1" B part
    run 0 xkv-store get -q --settings sealed -o back --remote "$1" --key-file key C part
    same part back
    rm back
}

assert_empty() { # STORE: nothing came in
    run 0 xkv-store stat "$1"
    out_has '^  entries +0$'
    out_has '^  bytes +0 '
    is 'files of blobs' "$(find "$1/tmp" "$1/blobs" "$1/quarantine" -type f)" ''
}
