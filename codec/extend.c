/* extend.c - entries that begin with rows of another one (spec/store.md, section 11): which rows are whose, and reading
 * a range across them. */
#include "entry_internal.h"
#include "moves.h"

/* --- Geometry ----------------------------------------------------------------------------------------------------- */

bool xkv_geometry_begins_alike(const xkv_geometry *a, const xkv_geometry *b, uint32_t count)
{
    if (a->layer_count != b->layer_count || a->plane_count != b->plane_count || a->rope_count != b->rope_count ||
        count > a->token_count || count > b->token_count ||
        memcmp(a->planes, b->planes, a->plane_count * sizeof *a->planes) != 0)
        return false;
    for (uint32_t i = 0; i < a->rope_count; i++)
        if (!xkv_rope_equal(&a->ropes[i], &b->ropes[i]))
            return false;
    return memcmp(a->positions, b->positions, count * sizeof *a->positions) == 0;
}

void xkv_views_from(const xkv_view *views, uint32_t count, uint32_t first, xkv_view *to)
{
    for (uint32_t i = 0; i < count; i++) {
        to[i] = views[i];
        if (to[i].rows)
            to[i].rows += first;
        else
            to[i].data = (uint8_t *)to[i].data + (int64_t)first * to[i].token_stride;
    }
}

/* --- Joining ------------------------------------------------------------------------------------------------------ */

static xkv_status check_fit(xkv_ctx *ctx, const xkv_entry *entry, const xkv_entry *parent, uint32_t base)
{
    const xkv_geometry *own = &entry->c.geometry, *theirs = &parent->geometry;

    if (base <= parent->base || base > theirs->token_count || own->token_count > XKV_MAX_TOKENS - base)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT,
                        "an entry of %u rows extends one after %u rows, expected %u .. %u of them [SE2]",
                        own->token_count, base, parent->base + 1, theirs->token_count);
    if (entry->c.has_framing)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "an entry that extends another has a framing of its own [SE4]");
    if (!xkv_geometry_begins_alike(own, theirs, 0) ||
        (own->token_count > 0 && own->positions[0] < theirs->positions[base - 1]))
        return xkv_fail(ctx, XKV_ERROR_CORRUPT,
                        "an entry extends one of other planes, or at positions before its own [SE4]");
    return XKV_OK;
}

xkv_status xkv_entry_extend(xkv_ctx *ctx, xkv_entry *entry, const xkv_entry *parent, uint32_t base, const uint8_t *fram,
                            size_t fram_size)
{
    const xkv_geometry *own = &entry->c.geometry;

    XKV_TRY(check_fit(ctx, entry, parent, base));
    XKV_TRY(XKV_NEW(ctx, (size_t)base + own->token_count, &entry->positions));
    memcpy(entry->positions, parent->geometry.positions, base * sizeof *entry->positions);
    if (own->token_count > 0)
        memcpy(entry->positions + base, own->positions, own->token_count * sizeof *entry->positions);
    entry->parent = parent;
    entry->base = base;
    entry->geometry.positions = entry->positions;
    entry->geometry.token_count = base + own->token_count;
    entry->geometry.token_id_count = 0; /* its own are not the first ones */
    if (fram_size == 0)
        return XKV_OK;
    XKV_TRY(xkv_framing_decode(ctx, &entry->geometry, fram, fram_size, &entry->c.framing, entry->c.source_hash));
    entry->c.has_framing = true;
    return XKV_OK;
}

/* --- Reading ------------------------------------------------------------------------------------------------------ */

/* A read across entries: each one's rows in turn, those of the one with the most of them last, while the groups of the
 * entry that was asked become ready. */
typedef struct reading {
    xkv_ctx *ctx;
    const xkv_entry *entry, *longest; /* that was asked; of the most rows */
    const xkv_entry *at;              /* being read */
    const xkv_read_options *o;
    const xkv_view *views;
    xkv_decode_fn decode; /* of one entry */
    void *user;
    xkv_view *shifted;    /* [plane_count] */
    uint8_t *done;        /* [plane_count] planes that are complete */
    uint32_t next_group;  /* to be announced */
    uint64_t read, total; /* bytes, for the progress */
} reading;

/* The rows that one of the entries gives: [*first, *end) of all. `limit`: where those of the one that extends it
 * begin. */
static bool rows_of(const xkv_entry *e, const xkv_read_options *o, uint32_t limit, uint32_t *first, uint32_t *end)
{
    *first = e->base > o->first_token ? e->base : o->first_token;
    *end = limit < o->first_token + o->token_count ? limit : o->first_token + o->token_count;
    return *first < *end;
}

static const xkv_entry *find_longest(const xkv_entry *entry, const xkv_read_options *o)
{
    const xkv_entry *longest = entry;
    uint32_t limit = UINT32_MAX, first, end, most = 0;

    for (const xkv_entry *e = entry; e; limit = e->base, e = e->parent)
        if (rows_of(e, o, limit, &first, &end) && end - first > most) {
            most = end - first;
            longest = e;
        }
    return longest;
}

/* Whether the groups of two entries hold the same planes, so that some can be asked for. */
static bool same_groups(const xkv_container *a, const xkv_container *b)
{
    if (a->group_count != b->group_count)
        return false;
    for (uint32_t i = 0; i < a->group_count; i++)
        if (a->groups[i].plane_count != b->groups[i].plane_count ||
            memcmp(a->groups[i].planes, b->groups[i].planes, a->groups[i].plane_count * sizeof(uint32_t)) != 0)
            return false;
    return true;
}

/* A group of the entry that is read last: the groups of the one that was asked whose planes are complete now. */
static int planes_ready(void *user, uint32_t group)
{
    reading *r = user;
    const xkv_group *g = &r->longest->c.groups[group];
    uint32_t end = r->o->first_group + r->o->group_count;

    for (uint32_t i = 0; i < g->plane_count; i++)
        r->done[g->planes[i]] = 1;
    for (; r->next_group < end; r->next_group++) {
        const xkv_group *next = &r->entry->c.groups[r->next_group];
        for (uint32_t i = 0; i < next->plane_count; i++)
            if (!r->done[next->planes[i]])
                return 0;
        int stop = r->o->group_ready(r->o->group_ready_user, r->next_group);
        if (stop != 0)
            return stop;
    }
    return 0;
}

static int bytes_read(void *user, uint64_t done, uint64_t total)
{
    reading *r = user;

    if (done == total) {
        r->read += total;
        done = 0;
    }
    return r->o->progress(r->o->progress_user, r->read + done, r->total);
}

static bool some_groups(const reading *r)
{
    return r->o->group_count < r->entry->c.group_count;
}

/* What one of the entries would refuse, before another has touched a view. */
static xkv_status check_asked(const reading *r)
{
    uint32_t limit = UINT32_MAX, first, end;
    xkv_moves moves;

    for (const xkv_entry *e = r->entry; e; limit = e->base, e = e->parent)
        if (some_groups(r) && rows_of(e, r->o, limit, &first, &end) && !same_groups(&e->c, &r->entry->c))
            return xkv_fail(r->ctx, XKV_ERROR_UNSUPPORTED,
                            "some groups of an entry that extends another, whose groups are not the same");
    XKV_TRY(xkv_moves_create(r->ctx, &r->entry->geometry, r->entry->c.groups, r->o, &moves));
    xkv_moves_free(r->ctx, &moves);
    return XKV_OK;
}

static xkv_status read_rows(reading *r, const xkv_entry *e, uint32_t first, uint32_t end)
{
    xkv_read_options o = xkv_read_options_default();

    if (some_groups(r)) {
        o.first_group = r->o->first_group;
        o.group_count = r->o->group_count;
    }
    o.first_token = first - e->base;
    o.token_count = end - first;
    if (r->o->positions)
        o.positions = r->o->positions + (first - r->o->first_token);
    if (r->o->group_ready && e == r->longest) {
        o.group_ready = planes_ready;
        o.group_ready_user = r;
    }
    if (r->o->progress) {
        o.progress = bytes_read;
        o.progress_user = r;
    }
    xkv_views_from(r->views, r->entry->geometry.plane_count, first - r->o->first_token, r->shifted);
    return r->decode(r->user, r->ctx, e, &o, r->shifted);
}

/* The rows of the longest entry, or those of all others. */
static xkv_status read_some(reading *r, bool longest)
{
    uint32_t limit = UINT32_MAX, first, end;

    for (const xkv_entry *e = r->entry; e; limit = e->base, e = e->parent)
        if ((e == r->longest) == longest && rows_of(e, r->o, limit, &first, &end))
            XKV_TRY(read_rows(r, e, first, end));
    return XKV_OK;
}

static uint64_t asked_bytes(const xkv_entry *entry, const xkv_read_options *o)
{
    uint64_t bytes = 0;

    for (uint32_t i = o->first_group; i < o->first_group + o->group_count; i++)
        bytes += xkv_group_row_bytes(&entry->c.geometry, &entry->c.groups[i], o->token_count);
    return bytes;
}

xkv_status xkv_extended_decode(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *o, const xkv_view *views,
                               xkv_decode_fn decode, void *user)
{
    reading r = {.ctx = ctx, .entry = entry, .o = o, .views = views, .decode = decode, .user = user};
    xkv_status status;

    r.next_group = o->first_group;
    r.longest = find_longest(entry, o);
    r.total = asked_bytes(entry, o);
    XKV_TRY_GOTO(XKV_NEW(ctx, entry->geometry.plane_count, &r.shifted), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, entry->geometry.plane_count, &r.done), out);
    XKV_TRY_GOTO(check_asked(&r), out);
    XKV_TRY_GOTO(read_some(&r, false), out);
    XKV_TRY_GOTO(read_some(&r, true), out);
out:
    xkv_release(ctx, r.shifted);
    xkv_release(ctx, r.done);
    return status;
}
