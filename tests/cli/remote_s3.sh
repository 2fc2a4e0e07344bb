# The remote tier on an S3 implementation (moto's server, from PyPI) that checks signatures, by botocore.
# shellcheck source=remote.sh
. "$(dirname "$0")/remote.sh"
export AWS_ACCESS_KEY_ID=none AWS_SECRET_ACCESS_KEY=none
run 0 xkv-store init probe
AWS_ENDPOINT_URL=http://127.0.0.1:1 xkv-store push --remote s3://b probe 2>&1 | grep -q 'not built in' &&
    skip 'built without libcurl'

cache=${XDG_CACHE_HOME:-$HOME/.cache}/xkv
venv=$cache/moto
install_moto() {
    [ -x "$venv/bin/python" ] || python3 -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'moto[server]==5.2.5'
}
mkdir -p "$cache"
exec 9>"$cache/moto.lock" # one installs
flock 9
install_moto >"$work/pip" 2>&1 || { tail -n 3 "$work/pip"; skip 'moto cannot be installed from PyPI'; }
exec 9>&-

port=$(free_port)
endpoint=http://127.0.0.1:$port
# Four calls before the rights are enforced: these make a user, what he may, his key, and the bucket.
make_user='
import boto3, json, sys
options = dict(endpoint_url=sys.argv[1], region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
iam = boto3.client("iam", **options)
iam.create_user(UserName="u")
policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
iam.put_user_policy(UserName="u", PolicyName="p", PolicyDocument=json.dumps(policy))
key = iam.create_access_key(UserName="u")["AccessKey"]
boto3.client("s3", **options).create_bucket(Bucket="bucket")
print(key["AccessKeyId"], key["SecretAccessKey"])
'
is_up() { python3 -c "import socket; socket.create_connection(('127.0.0.1', $port))"; }
start_moto() {
    INITIAL_NO_AUTH_ACTION_COUNT=4 "$venv/bin/moto_server" -H 127.0.0.1 -p "$port" >"$work/moto" 2>&1 &
    pids+=($!)
    wait_for is_up
    read -r AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY < <("$venv/bin/python" -c "$make_user" "$endpoint")
}
# OPERATION ARGUMENT...: a call of boto3's client
s3() {
    "$venv/bin/python" -c '
import boto3, sys
client = boto3.client("s3", endpoint_url=sys.argv[1], region_name="us-east-1")
name, *words = sys.argv[2:]
if name == "list":
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=words[0])
    print("\n".join(o["Key"] for page in pages for o in page.get("Contents", [])))
elif name == "put":
    client.put_object(Bucket="bucket", Key=words[0], Body=open(words[1], "rb").read())
else:
    sys.stdout.buffer.write(client.get_object(Bucket="bucket", Key=words[0])["Body"].read())
' "$endpoint" "$@"
}

export AWS_ENDPOINT_URL=$endpoint AWS_REGION=us-east-1
start_moto
check_sharing s3://bucket
run 0 s3 list i/
is 'index objects, one for each block' "$(wc -l <<<"$out")" 3
check_large s3://bucket/large
check_dictionary s3://bucket/a/b-c_d.e
run 0 s3 list a/b-c_d.e/
is 'names' "$(grep -cE '^a/b-c_d\.e/[ibd]/[0-9a-f]{64}$' <<<"$out")" 5
check_line s3://bucket/line
run 0 s3 list line/
is 'objects of 600 tokens and 700 behind 512 of them' "$(wc -l <<<"$out")" 6
check_tenants s3://bucket/tenants/
check_encryption s3://bucket/sealed
machines B
AWS_REGION='' AWS_DEFAULT_REGION=eu-west-1 run 7 xkv-store match --remote s3://bucket/none B a
err_is ''

# Damage is a miss, and leaves nothing behind.
machines A B
run 0 xkv-store put -q --remote s3://bucket/damage A a
blob=$(s3 list damage/b/)
s3 get "$blob" >object
flip_bit object 5000
run 0 s3 put "$blob" object
run 7 xkv-store match --remote s3://bucket/damage B a
err_has "the remote's object b/[0-9a-f]{64} is of no use: its size or hash is not that of its name \[SR5\]$"
assert_empty B
echo more >>object
run 0 s3 put "$blob" object
run 7 xkv-store match --remote s3://bucket/damage B a
err_has 'is of no use: the remote.s object is larger than [0-9]+ bytes \[SR4\]$'
assert_empty B

# What waits is sent when bucket, secret and server are as they should be.
machines A B
run 0 xkv-store put --remote s3://nowhere A a
out_is 'a: stored as 1, 700 tokens, SIZE'
err_has '1 entries wait to be sent, push sends them: s3: HTTP 404 NoSuchBucket$'
run 7 xkv-store match --remote s3://nowhere B a
err_has 'left alone for a while: s3: HTTP 404 NoSuchBucket$'
AWS_SECRET_ACCESS_KEY=wrong run 1 xkv-store push --remote s3://bucket/late A
err_has 's3: HTTP 403 SignatureDoesNotMatch$'
stop_all
run 1 xkv-store push --remote s3://bucket/late A
err_has 's3: Failed to connect to 127.0.0.1'
start_moto
run 0 xkv-store push --remote s3://bucket/late A
err_is 'xkv-store: A: 1 entries sent, 0 waiting'
run 0 xkv-store match -q --remote s3://bucket/late B a

AWS_SECRET_ACCESS_KEY='' run 2 xkv-store push --remote s3://bucket A
err_has 'AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set'
AWS_ENDPOINT_URL=ftp://x run 2 xkv-store push --remote s3://bucket A
err_has 'AWS_ENDPOINT_URL begins with neither'
run 2 xkv-store push --remote 's3://bucket/a b' A
run 2 xkv-store push --remote 's3://bucket/../b' A
finish
