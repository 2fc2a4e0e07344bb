# SIGINT, SIGTERM and SIGHUP in the middle: exit code 130, a message, nothing left, nothing lost.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

make_ggsq layers=16 tokens=1500 width=256 >a
echo precious >out

interrupted() { # SIGNAL MESSAGE COMMAND...: while the library works; a hidden file tells that it does
    local signal=$1 message=$2 pid i
    shift 2
    shown="$*, $signal"
    env --default-signal "$@" 2>"$work/err" &
    pid=$!
    for ((i = 0; i < 1000; i++)); do
        compgen -G '.xkv-*.tmp' >/dev/null && break
        sleep 0.01
    done
    kill "-$signal" $pid
    wait $pid
    is "exit code after SIG$signal" $? 130
    err=$(cat "$work/err")
    err_is "$message"
    files_are a out
    is out "$(cat out)" precious
}
for signal in INT TERM HUP; do
    interrupted $signal 'xkv-pack: a: interrupted' xkv-pack -T1 -f --iterations 8 --error 0.001 -o out a
done
interrupted INT 'xkv-train: out: interrupted' xkv-train -q -T1 -f -o out a

# While it waits for standard input.
mkfifo pipe
shown='xkv-pack <pipe'
env --default-signal xkv-pack -o out2 <pipe 2>"$work/err" &
pid=$!
exec 3>pipe
printf x >&3
sleep 0.3
kill -INT $pid
wait $pid
is 'exit code' $? 130
exec 3>&-
err=$(cat "$work/err")
err_is 'xkv-pack: stdin: interrupted'
files_are a out pipe
finish
