# The store, command by command: results, misses, tenants, damage, states that need an operator.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

make_ggsq tokens=300 >a # tokens 100, 107, 114, ...
make_ggsq tokens=120 >part

# A store is made once, in an empty folder.
run 0 xkv-store init s
run 1 xkv-store init s
err_is 'xkv-store: s: exists and is not an empty folder'
is 'mode of the store' "$(stat -c %a s)" 700
run 1 xkv-store stat nowhere
err_has '^xkv-store: nowhere: .*No such file or directory$'
mkdir empty
run 3 xkv-store stat empty
err_has '\[SO1\]$'
rmdir empty

# What was put is found by the engine's file, by a list and by a longer prompt, and comes back identical.
run 0 xkv-store put s a
out_is 'a: stored as 1, 300 tokens, SIZE'
run 0 xkv-store put s a
out_is 'a: is there as 1, 300 tokens, SIZE'
run 0 xkv-store match s a
out_is '300 of 300 tokens, entry 1 of 300 tokens, SIZE'
run 0 xkv-store match s 100,107,114,5
out_is '3 of 4 tokens, entry 1 of 300 tokens, SIZE'
(od -An -v -tu4 -j 12 -N 1200 a; echo 8,9) >prompt # its token ids, and two more
run 0 xkv-store match s prompt
out_is '300 of 302 tokens, entry 1 of 300 tokens, SIZE'
run 0 sh -c 'xkv-store match s - <prompt'
out_is '300 of 302 tokens, entry 1 of 300 tokens, SIZE'
run 0 xkv-store get -o back s prompt
same a back
run 0 sh -c 'xkv-store get -o - s a | cat >back2'
same a back2

# A prefix comes back as a file that the engine takes: the same as xkv-unpack --first makes.
run 0 xkv-pack -q a
run 0 xkv-unpack -q --first 120 -o first a.xkv
run 0 xkv-store get -q -f -o back s part
same first back
run 1 xkv-store get -q -o back s part
err_is 'xkv-store: back: already exists; use -f to overwrite it'
run 0 xkv-store get -q -f -o back --id 1 s
same a back
rm -f back back2 first a.xkv

# Where a window has slid only the whole can be restored: what a prompt shares with it before its end is no match.
make_ggsq tokens=300 seed=9 window=50 >slid
run 0 xkv-store init t
run 0 xkv-store put t slid
run 0 xkv-store match t prompt
out_is '300 of 302 tokens, entry 1 of 300 tokens, SIZE'
run 0 xkv-store get -q -o back t prompt
same slid back
run 7 xkv-store match t part
out_is '0 of 120 tokens: the entry can only be restored whole, and the prompt parts from it before'
run 7 xkv-store match --json t part
out_has '"reason":"whole only","tokens":0,"prompt_tokens":120,"entry_tokens":300,"id":1,'
run 7 xkv-store get -q -o none t part
err_is 'xkv-store: the entry can only be restored whole, and the prompt parts from it before'
run 0 xkv-store put t part # another one, which can be cut, serves
run 0 xkv-store match t 100,107,114,5
out_is '3 of 4 tokens, entry 2 of 120 tokens, SIZE'
rm -rf t slid back

# Misses say why.
run 7 xkv-store match s 1,2,3
out_is '0 of 3 tokens: nothing stored begins like it'
run 7 xkv-store match --min 10 s 100,107,5
out_is '0 of 3 tokens: what is stored is too short'
run 7 xkv-store get -o none s 1,2,3
err_is 'xkv-store: nothing stored begins like it'
run 7 xkv-store match --json s 1
out_is '{"file":"1","ok":false,"reason":"none","tokens":0,"prompt_tokens":1,"entry_tokens":0,"id":0,"bytes":0}'
run 7 xkv-store rm s 99
err_is 'xkv-store: s: no such entry: there is no entry 99 in the namespace'
run 2 xkv-store match s 1,x
err_has '^xkv-store: 1,x: neither a file nor a list of tokens$'
echo '1 2 three' >bad
run 3 xkv-store match s bad
err_is "xkv-store: bad: neither an engine's file nor a list of tokens"
run 3 xkv-store put s bad
err_is 'xkv-store: bad: neither an entry nor a known engine file'
rm bad

# Tenants, models and settings keep apart.
echo secret >salt
run 0 xkv-store put -q --salt-file salt s part
run 0 xkv-store match --salt-file salt s a
out_is '120 of 300 tokens, entry 2 of 120 tokens, SIZE'
run 7 xkv-store match -q --settings x s a
run 7 xkv-store match -q --lora x s a
run 7 xkv-store match -q --fingerprint 00112233445566778899aabbccddeeff s a
run 7 xkv-store rm s 2
run 7 xkv-store get -o none --id 2 s
run 0 xkv-store ls -q s
is 'entries without the salt' "$(wc -l <<<"$out")" 1
run 0 xkv-store ls --json --salt-file salt s
out_has '^\{"id":2,"tokens":120,"pinned":false,'
run 0 xkv-store rm --all --salt-file salt s
err_is 'xkv-store: s: removed 1 entries'
: >salt
run 1 xkv-store ls --salt-file salt s
err_is 'xkv-store: salt: cannot be read, is empty, or too long for a salt'
rm salt

# Entries, dictionaries, export and import.
run 0 xkv-train -q -o d.xkvd a
run 0 xkv-pack -q -D d.xkvd -o dict.xkv part
run 4 xkv-store put s dict.xkv
err_has 'the dictionary of the entry is not in the store$'
run 0 xkv-store put -q s d.xkvd dict.xkv
run 0 xkv-store get -q -o back --id 4 s
run 0 xkv-unpack -q -D d.xkvd -o back2 dict.xkv
same back back2
run 0 xkv-store put -q -D d.xkvd --quality 50 --settings other s a
run 0 xkv-store export -o e s 4
run 0 xkv-store init t
run 0 xkv-store import t e # its dictionary comes along
out_is 'e: stored as 2, 120 tokens, SIZE'
run 0 xkv-store match t part
out_is '120 of 120 tokens, entry 2 of 120 tokens, SIZE'
flip_bit e 2000
run 3 xkv-store import t e
run 3 xkv-store import t a
err_has '\[SB1\]$'
rm -rf t e back back2

# A longer prompt is stored behind what is there, and comes back identical, also from an export.
make_ggsq tokens=600 >long
run 0 xkv-store init t
run 0 xkv-store put t a
run 0 xkv-store put t long
out_is 'long: stored as 2, 600 tokens, SIZE behind 256 tokens of 1'
run 0 xkv-store get -q -o back t long
same long back
run 0 xkv-store get -q -f -o back t a
same a back
run 0 xkv-pack -q -o long.xkv long
run 0 xkv-unpack -q --first 400 -o first long.xkv
run 0 xkv-store get -q -f -o back t first
same first back
run 0 xkv-store verify -q --decode t
run 0 xkv-store ls --json t
out_has '"parent":1,"base_tokens":256,"children":0,'
run 0 xkv-store stat t
out_has '^  extending entries +1$'
run 0 xkv-store put --whole --settings x t a long
out_has '^long: stored as 4, 600 tokens, [0-9.]+ [KM]iB$'
run 0 xkv-store export -q -o e t 2
run 0 xkv-store init u
run 0 xkv-store import u e
out_is 'e: stored as 2, 600 tokens, SIZE behind 256 tokens of 1'
rm -rf u/index/data.mdb
run 0 xkv-store repair -q u
run 0 xkv-store get -q -f -o back u long
same long back
run 0 xkv-store rm u 1
run 7 xkv-store match -q u long
rm -rf t u e back first long long.xkv

# Encryption: the right key or nothing; exports are plain.
head -c 32 /dev/urandom >key
head -c 32 /dev/urandom >key2
run 0 xkv-store init --key-file key t
run 0 xkv-store put -q --key-file key t a
run 0 xkv-store get -q --key-file key -o back t a
same a back
run 4 xkv-store match --key-file key2 t a
err_has 't is encrypted with another key \[SO6\]$'
run 4 xkv-store match t a
err_has 't is encrypted: it needs its key \[SO6\]$'
run 4 xkv-store ls --key-file key s
err_has 's is not encrypted: it takes no key \[SO6\]$'
echo short >key2
run 1 xkv-store ls --key-file key2 t
err_is 'xkv-store: key2: a key is a file of 32 bytes'
run 1 grep -q GEOM t/blobs/*
run 0 xkv-store gc -q --compact --key-file key t
run 0 xkv-store repair -q --key-file key t
run 0 xkv-store verify -q --decode --key-file key t
run 0 xkv-store put -q --key-file key --lora x t d.xkvd dict.xkv
run 0 xkv-store get -q -f --key-file key --lora x -o back t part
run 0 xkv-unpack -q -D d.xkvd -o back2 dict.xkv
same back back2
rm -rf t back back2 key key2 d.xkvd dict.xkv

# The cap, pins, expiry.
run 0 xkv-store verify --decode s
err_has '^xkv-store: s: OK, 3 entries, '
run 0 xkv-store pin s 1
run 0 xkv-store gc --unused-dictionaries --cap 120K s
err_has '^xkv-store: s: 0 expired, 2 evicted, 0 orphans, 0 leftovers, '
run 0 xkv-store ls -q s
is 'the pinned one' "$(awk '{print $1, $NF}' <<<"$out")" '1 pinned'
run 6 xkv-store put --settings x s part
err_has 'do not fit under the cap'
run 0 xkv-store unpin s 1
run 0 xkv-store gc -q --cap 0 s
run 0 xkv-store put -q --ttl 1 --settings x s part
sleep 1.1
run 7 xkv-store match -q --settings x s part
run 0 xkv-store stat --json s
out_has '"expirations":1,'

run 2 xkv-store match --id 1 s part
err_has '^xkv-store: --id goes with get$'
cp -r s t
run 0 xkv-store put -q --settings x t part
run 0 xkv-store gc --json --cap 1 t
out_has '"expired":0,"evicted":2,.*"freed_bytes":[1-9]'
rm -r t

# Damage: a miss, quarantine, a message; then a repair.
flip_bit s/blobs/* 2000
run 3 xkv-store verify s
err_has '^xkv-store: s: 1 damaged, 0 missing, 0 unreachable, 0 bad records; entry 1: .*\[SB6\]$'
run 3 xkv-store get -o none s a
run 7 xkv-store match -q s a
run 0 xkv-store stat s
out_has '^  damaged +1$'
out_has '^  quarantined files +1$'
run 0 xkv-store put -q s a part
run 0 xkv-store pin s 7
flip_bit s/index/data.mdb 5000
truncate -s 9000 s/index/data.mdb
run 3 xkv-store ls s
err_has '\[SI1\]$'
run 0 xkv-store repair s
err_has '^xkv-store: s: 2 entries and 0 dictionaries, 0 damaged files in quarantine; pins and times of use are lost$'
run 0 xkv-store verify -q s
run 0 xkv-store match s a
out_is '300 of 300 tokens, entry 7 of 300 tokens, SIZE'
run 0 xkv-store gc -q --compact s
run 0 xkv-store verify -q s

# How to pack, as for xkv-pack: the same rows come back.
make_ggsq tokens=300 >shape
run 0 xkv-train -q -o shape.xkvd shape
for how in '-1 --sinks 16' '-19' '--error 0.2 --window 8' '--rank-k 4 --rank-v 4 --group 2' '--quality 40'; do
    rm -rf t
    run 0 xkv-store init t
    case $how in *quality*) export XKV_DICT_PATH=shape.xkvd ;; esac
    # shellcheck disable=SC2086
    run 0 xkv-store put -q $how t shape
    # shellcheck disable=SC2086
    run 0 xkv-pack -q -f -o shape.xkv $how shape
    run 0 xkv-unpack -q -f -o there shape.xkv
    run 0 xkv-store get -q -f -o here t shape
    same there here
done
unset XKV_DICT_PATH
rm -rf t shape* there here

# Damaged properties, links, folders that others can write to.
cp -r s t
printf '\x03' | dd of=t/store bs=1 seek=10 conv=notrunc status=none
run 3 xkv-store stat t
err_has 'the checksum of the file "store" does not match: repair makes it anew \[SO3\]$'
run 0 xkv-store repair t
err_has 'the properties of the store were damaged and are made anew$'
run 0 xkv-store repair --json t
out_has '"newer":0,"kept_uses":true,"lost_properties":false'
cmp s/store t/store
chmod g+w t
run 1 xkv-store stat t
err_has 'others can write to the folder t: mode 720 \[SO5\]$'
chmod g-w t
mv t/blobs moved
ln -s ../moved t/blobs
run 1 xkv-store stat t
rm -rf t moved

# A full disk: nothing is left of what did not fit.
make_ggsq tokens=2000 layers=8 >big
run 1 bash -c 'ulimit -f 60; xkv-store put -q s big'
err_has 'File too large'
run 0 xkv-store verify -q s
is 'temporary files of the store' "$(ls -A s/tmp)" ''

# A killed one too.
xkv-store put -q --error 0.001 s big &
sleep 0.1
kill -9 $!
wait $! 2>/dev/null
run 0 xkv-store stat -q s
is 'temporary files of the store' "$(ls -A s/tmp)" ''
rm -rf s
files_are a big part prompt
finish
