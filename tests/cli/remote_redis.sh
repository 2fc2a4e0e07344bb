# The remote tier on a real Redis server.
# shellcheck source=remote.sh
. "$(dirname "$0")/remote.sh"
run 0 xkv-store init probe
xkv-store push --remote redis://127.0.0.1:1 probe 2>&1 | grep -q 'not built in' && skip 'built without hiredis'
command -v redis-server >/dev/null || skip 'there is no redis-server'

port=$(free_port)
url=redis://127.0.0.1:$port
redis() { redis-cli -p "$port" "$@"; }
is_up() { [ "$(redis ping)" = PONG ]; }

start_redis() { # [OPTION...]
    redis-server --port "$port" --bind 127.0.0.1 --save '' --appendonly no --dir "$work/tmp" "$@" >"$work/redis" 2>&1 &
    pids+=($!)
    wait_for is_up
}

start_redis
check_sharing "$url"
run 0 redis --scan --pattern 'xkv/i/*'
is 'index objects, one for each block' "$(wc -l <<<"$out")" 3
check_large "$url"
is 'values left over' "$(redis --scan | grep -vcE '^xkv/[ibd]/[0-9a-f]{64}$')" 0
is 'values that expire' "$(for k in $(redis --scan); do redis ttl "$k"; done | sort -u)" -1
check_dictionary "$url/1"
check_line "$url/4"
is 'objects of 600 tokens and 700 behind 512 of them' "$(redis -n 4 --scan | wc -l)" 6
check_tenants "$url/2"
check_encryption "$url/3"
is 'objects of an entry of three blocks' "$(redis -n 3 --scan | wc -l)" 4

# A damaged object is a miss with a reason, and leaves nothing behind.
machines A B
run 0 redis flushall
run 0 xkv-store put -q --remote "$url" A a
blob=$(redis --scan --pattern 'xkv/b/*')
run 0 redis setrange "$blob" 5000 x
run 7 xkv-store match --remote "$url" B a
out_is '0 of 700 tokens: nothing stored begins like it'
err_has "the remote's object b/[0-9a-f]{64} is of no use: its size or hash is not that of its name \[SR5\]$"
assert_empty B
run 0 redis append "$blob" more # larger than announced
run 7 xkv-store match --remote "$url" B a
err_has 'is of no use: the remote.s object is larger than [0-9]+ bytes \[SR4\]$'
assert_empty B
for index in $(redis --scan --pattern 'xkv/i/*'); do
    run 0 redis set "$index" nonsense
done
run 7 xkv-store match --remote "$url" B a
err_has "object i/[0-9a-f]{64} is of no use: index object: 8 bytes that are none \[SR2\]$"
run 0 redis flushall # evicted, for example
run 7 xkv-store match --remote "$url" B a
err_is ''
assert_empty B

# The server is down: everything goes on, and what waits is sent when it is back.
stop_all
machines A B
run 0 xkv-store put --remote "$url" A a
out_is 'a: stored as 1, 700 tokens, SIZE'
err_has '^xkv-store: A: 1 entries wait to be sent, push sends them: redis: cannot connect to '
run 0 xkv-store match -q --remote "$url" A a
run 1 xkv-store push --json --remote "$url" A
out_has '"ok":false,"sent":0,"dropped":0,"waiting":1,"why":"redis: cannot connect'
run 7 xkv-store match -q --remote "$url" B a
start_redis
run 0 xkv-store push --json --remote "$url" A
out_is '{"ok":true,"sent":1,"dropped":0,"waiting":0,"why":""}'
run 0 xkv-store match -q --remote "$url" B a

# Entries from before the remote was there.
run 0 redis flushall
machines C
run 0 xkv-store push --remote "$url" A
err_is 'xkv-store: A: 0 entries sent, 0 waiting'
run 0 xkv-store push --all --remote "$url" A
err_is 'xkv-store: A: 1 entries sent, 0 waiting'
run 0 xkv-store match -q --remote "$url" C a
run 2 xkv-store push A
err_has 'push needs --remote'

# A password comes from the environment.
stop_all
redis() { REDISCLI_AUTH=word redis-cli -p "$port" "$@"; }
start_redis --requirepass word
run 7 xkv-store match --remote "$url" B 1,2,3
err_has 'redis: GETRANGE: NOAUTH'
run 0 redis acl log reset
REDISCLI_AUTH=wrong run 1 xkv-store push --all --remote "$url" A
err_has 'redis: AUTH: WRONGPASS'
is 'tries with a password that is refused' "$(redis acl log | grep -A 1 -x count | tail -n 1)" 1
REDISCLI_AUTH=word run 0 xkv-store push --remote "$url" A
run 2 xkv-store push --remote redis://:word@127.0.0.1 A
err_has 'a password comes from REDISCLI_AUTH'
finish
