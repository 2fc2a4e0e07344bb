# Remotes that break the rules: each costs a lookup its time at most, and is a miss with a reason. See hostile_server.py.
# shellcheck source=remote.sh
. "$(dirname "$0")/remote.sh"
server=$data/../cli/hostile_server.py
export AWS_ACCESS_KEY_ID=none AWS_SECRET_ACCESS_KEY=none
machines A
run 0 xkv-store put -q A a

start() { # MODE: sets $port
    stop_all
    rm -f "$work/port"
    python3 "$server" "$1" >"$work/port" &
    pids+=($!)
    wait_for test -s "$work/port"
    port=$(cat "$work/port")
}

# Whoever waits for ever is killed by timeout, which the exit code tells.
check() { # URL REASON
    run 7 timeout 60 xkv-store match --wait 1 --remote "$1" A 9,8,7
    out_is '0 of 3 tokens: nothing stored begins like it'
    err_has "$2"
    run 0 timeout 60 xkv-store match -q --wait 1 --remote "$1" A a # the folder serves
}

built() { ! xkv-store push --remote "$1" A 2>&1 | grep -q 'not built in'; }

if built redis://127.0.0.1:1; then
    tested=redis
    while read -r mode reason; do
        start "$mode"
        check "redis://127.0.0.1:$port" "left alone for a while: redis: $reason"
    done <<-'END'
	silent        no answer in time
	close         Server closed the connection
	garbage       Protocol error
	redis-array   Out of memory
	redis-nested  Out of memory
	redis-endless a reply of more than [0-9]+ bytes \[SR4\]
	redis-drip    no answer in time
	redis-long    a reply of more than|GETRANGE: an unexpected kind of reply
	redis-kind    GETRANGE: an unexpected kind of reply
	END
fi
if built s3://bucket; then
    tested=s3
    while read -r mode reason; do
        start "$mode"
        AWS_ENDPOINT_URL=http://127.0.0.1:$port check s3://bucket "$reason"
    done <<-'END'
	silent         left alone for a while: s3: .*timed out
	close          left alone for a while: s3: Empty reply from server
	garbage        left alone for a while: s3: 
	http-endless   is of no use: .*larger than
	http-announced is of no use: .*larger than
	http-header    left alone for a while: s3: 
	http-drip      left alone for a while: s3: .*timed out
	http-short     left alone for a while: s3: 
	http-redirect  left alone for a while: s3: HTTP 302
	http-403       denies access to i/[0-9a-f]{64}, which counts as not there
	http-500       left alone for a while: s3: HTTP 500
	END
fi
[ -n "${tested:-}" ] || skip 'built without a remote'

# A server that dies in the middle of an upload: the entry waits.
start close
machines B
run 0 timeout 60 xkv-store put -q --remote "redis://127.0.0.1:$port" B large
err_has '1 entries wait to be sent'
run 0 xkv-store match -q B large
finish
