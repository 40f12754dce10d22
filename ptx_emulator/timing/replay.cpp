// Replays the streams of a few CTAs on the units of their SMs, event by event. See replay.py.
//
// A warp issues in order. An instruction issues when its registers, its scheduler and its pipe are
// ready; what it then holds and for how long is its Op's. Asynchronous operations end as events
// that arrive on mbarriers, whose phases are counted as the machine counts them.
#include <algorithm>
#include <cstdint>
#include <queue>
#include <vector>

namespace {

enum Kind {
    PLAIN, FREE, SHARED, TMEM_LOAD, TMEM_STORE, TMEM_WAIT, WAIT, ARRIVE, EXPECT, NAMED_SYNC,
    NAMED_ARRIVE, CLUSTER_ARRIVE, CLUSTER_WAIT, LOAD, STORE, STORE_COMMIT, STORE_WAIT, PRODUCT,
    COMMIT, WGMMA, WGMMA_COMMIT, WGMMA_WAIT, COPY, COPY_COMMIT, COPY_WAIT, COPY_ARRIVE, GLOBAL,
};
enum Pipe { NONE, FMA, ALU, MUFU, TENSOR, LSU, PIPES };
enum Unit { U_TENSOR = PIPES, U_TMEM, U_SMEM, U_L2, U_ISSUE, UNITS };

struct Op {
    int32_t kind, pipe, blocking, read_from, read_to, write_from, write_to;
    float cycles, latency, slots, amount;
};

struct Machine {  // in the order of replay.py's NAMES
    double tensor_flops, smem_bytes, tmem_read, tmem_write, l2_bytes, queue, tma_latency,
        store_latency, mma_latency, sync_latency, arrive_latency, commit_latency, stretch,
        tmem_latency;
};

struct Input {
    const Op* ops;
    const int32_t* registers;                      // of the ops' reads and writes
    int32_t num_registers, num_warps, num_ctas, num_sms, num_barriers, num_units_kept;
    const int32_t *warp_cta, *warp_number;         // by warp
    const int64_t* warp_start;                     // num_warps + 1, into code
    const int32_t* code;                           // ops
    const int64_t* names_start;                    // by place in code, one more at the end
    const int32_t* names;                          // pairs
    const int32_t *cta_sm, *cta_cluster, *cta_peer;
    const double* cta_begin;
    const int32_t* barrier_counts;
    double* issue;                                 // by place in code; or null
    double *warp_end, *busy;                       // busy: num_sms * UNITS
    double* kept;                                  // (unit, SM, start, end) of what units did
};

struct Event {
    double time, key;
    int32_t type, id, amount;  // 0: warp id goes on; 1: arrivals; 2: bytes, on barrier id
};
struct Later {
    bool operator()(const Event& a, const Event& b) const {
        return a.time != b.time ? a.time > b.time : a.key > b.key;
    }
};

struct Barrier {
    int64_t count = 0, pending = 0, tx = 0, phase = 0;
    std::vector<std::pair<int, int>> waiters;  // warp, parity
};
struct Group {
    int64_t threads = 0, phase = 0;
    std::vector<int> waiters;
};
struct Warp {
    int64_t at, end;
    double next = 0, last = 0, stored = 0, loaded = 0, product = 0, wgmma = 0, bulk = 0, copied = 0;
    int64_t cluster = 0;
    std::vector<double> ready, wgmma_groups, bulk_groups, copy_groups;
    bool done = false;
};
struct Scheduler {
    double issue = 0, pipe[PIPES] = {}, tmem = 0;
};
struct Sm {
    Scheduler schedulers[4];
    double tensor = 0, l2 = 0, debt = 0;  // debt: bytes of shared memory beside the products'
};

struct Replay {
    const Input& in;
    const Machine& m;
    std::vector<Warp> warps;
    std::vector<Sm> sms;
    std::vector<Barrier> barriers;
    std::vector<Group> named, clusters;
    std::vector<int64_t> cluster_threads;
    std::priority_queue<Event, std::vector<Event>, Later> events;
    int64_t left = 0, kept = 0;

    Replay(const Input& input, const Machine& machine)
        : in(input), m(machine), warps(in.num_warps), sms(in.num_sms), barriers(in.num_barriers),
          named(16 * in.num_ctas), clusters(in.num_ctas), cluster_threads(in.num_ctas) {
        for (int i = 0; i < in.num_barriers; i++)
            barriers[i].count = barriers[i].pending = in.barrier_counts[i];
        for (int w = 0; w < in.num_warps; w++) {
            warps[w].at = in.warp_start[w];
            warps[w].end = in.warp_start[w + 1];
            warps[w].ready.assign(in.num_registers, 0.0);
            cluster_threads[in.cta_cluster[in.warp_cta[w]]] += 32;
            go_on(w, in.cta_begin[in.warp_cta[w]]);
            left++;
        }
    }

    void go_on(int w, double time) { events.push({time, warps[w].last, 0, w, 0}); }

    void unit(int sm, int which, double start, double end) {
        in.busy[sm * UNITS + which] += end - start;
        if (which >= PIPES && which < U_SMEM && kept < in.num_units_kept) {
            double* row = in.kept + 4 * kept++;
            row[0] = which, row[1] = sm, row[2] = start, row[3] = end;
        }
    }

    bool run() {
        while (!events.empty()) {
            Event e = events.top();
            events.pop();
            if (e.type == 0) step(e.id, e.time);
            else signal(barriers[e.id], e.type == 1 ? e.amount : 0, e.type == 2 ? -e.amount : 0, e.time);
        }
        return left == 0;
    }

    void signal(Barrier& b, int64_t arrivals, int64_t bytes, double time) {
        b.pending -= arrivals;
        b.tx += bytes;
        while (b.pending <= 0 && b.tx == 0) {
            b.phase++;
            b.pending += b.count;
            std::vector<std::pair<int, int>> stay;
            for (auto [w, parity] : b.waiters)
                if ((b.phase & 1) != parity) go_on(w, time + m.sync_latency);
                else stay.push_back({w, parity});
            b.waiters.swap(stay);
        }
    }

    // Issue of a warp's next instruction, if it can issue at `time`.
    void step(int w, double time) {
        Warp& warp = warps[w];
        Sm& sm = sms[in.cta_sm[in.warp_cta[w]]];
        Scheduler& s = sm.schedulers[in.warp_number[w] % 4];
        while (warp.at < warp.end) {
            const Op& op = in.ops[in.code[warp.at]];
            double at = time;
            for (int i = op.read_from; i < op.read_to; i++)
                at = std::max(at, warp.ready[in.registers[i]]);
            if (op.kind == FREE) {
                double when = 0;
                for (int i = op.read_from; i < op.read_to; i++)
                    when = std::max(when, warp.ready[in.registers[i]]);
                for (int i = op.write_from; i < op.write_to; i++)
                    warp.ready[in.registers[i]] = when;
                if (in.issue) in.issue[warp.at] = time;
                warp.at++;
                continue;
            }
            double queue = op.pipe == MUFU || op.pipe == LSU ? m.queue * op.cycles : 0;
            at = std::max(at, s.issue);
            if (op.pipe != NONE && op.kind != WGMMA) at = std::max(at, s.pipe[op.pipe] - queue);
            if (at > time) return go_on(w, at);
            if (in.issue) in.issue[warp.at] = time;
            double slots = op.slots * m.stretch;
            s.issue = time + slots;
            in.busy[in.cta_sm[in.warp_cta[w]] * UNITS + U_ISSUE] += slots;
            warp.last = time;
            warp.at++;
            double following = execute(w, warp.at - 1, op, time);
            if (following < 0) return;  // waits on something that wakes it
            return go_on(w, std::max(following, time + slots));
        }
        warp.done = true;
        in.warp_end[w] = time;
        left--;
    }

    void written(Warp& warp, const Op& op, double when) {
        for (int i = op.write_from; i < op.write_to; i++) warp.ready[in.registers[i]] = when;
    }

    // Effects of an instruction that issues at `t`; when the warp may go on, or -1.
    double execute(int w, int64_t place, const Op& op, double t) {
        Warp& warp = warps[w];
        int cta = in.warp_cta[w], sm_number = in.cta_sm[cta];
        Sm& sm = sms[sm_number];
        Scheduler& s = sm.schedulers[in.warp_number[w] % 4];
        const int32_t* names = in.names + 2 * in.names_start[place];
        int64_t count = in.names_start[place + 1] - in.names_start[place];
        double start = t;
        if (op.pipe != NONE) {
            start = std::max(t, s.pipe[op.pipe]);
            s.pipe[op.pipe] = start + op.cycles;
            unit(sm_number, op.pipe, start, start + op.cycles);
        }
        double ended = start + op.cycles + op.latency;
        switch (op.kind) {
        case SHARED:
            sm.debt += op.amount;
            in.busy[sm_number * UNITS + U_SMEM] += op.amount / m.smem_bytes;
            written(warp, op, std::max(ended, start + op.amount / m.smem_bytes + op.latency));
            return t;
        case GLOBAL:
            written(warp, op, fetch(sm_number, op.amount, start) + op.latency);
            return t;
        case TMEM_LOAD:
        case TMEM_STORE: {
            double from = std::max(start, s.tmem);
            double width = op.kind == TMEM_LOAD ? m.tmem_read : m.tmem_write;
            s.tmem = from + op.amount / width;
            unit(sm_number, U_TMEM, from, s.tmem);
            if (op.kind == TMEM_STORE) warp.stored = s.tmem + m.tmem_latency;
            else written(warp, op, warp.loaded = s.tmem + m.tmem_latency);
            return t;
        }
        case TMEM_WAIT: return std::max(t, op.amount ? warp.loaded : warp.stored);
        case WAIT: return wait(w, op, names, count, t);
        case ARRIVE:
            for (int64_t i = 0; i < count; i++)
                events.push({t + m.arrive_latency, 0, 1, names[2 * i], names[2 * i + 1]});
            return t;
        case EXPECT:
            for (int64_t i = 0; i < count; i++) {
                barriers[names[2 * i]].tx += names[2 * i + 1];
                if (op.amount == 0) events.push({t + m.arrive_latency, 0, 1, names[2 * i], 1});
            }
            return t;
        case NAMED_SYNC:
        case NAMED_ARRIVE: return count ? named_barrier(w, op, names, t) : t;
        case CLUSTER_ARRIVE: {
            Group& g = clusters[in.cta_cluster[cta]];
            warp.cluster++;
            g.threads += 32;
            if (g.threads == cluster_threads[in.cta_cluster[cta]]) release(g, t);
            return t;
        }
        case CLUSTER_WAIT: {
            Group& g = clusters[in.cta_cluster[cta]];
            if (g.phase >= warp.cluster) return t + m.sync_latency;
            g.waiters.push_back(w);
            return -1;
        }
        case LOAD:
            for (int64_t i = 0; i < count; i++) {
                double end = fetch(sm_number, names[2 * i + 1], t) + m.tma_latency;
                sm.debt += names[2 * i + 1];
                events.push({end, 0, 2, names[2 * i], names[2 * i + 1]});
            }
            return t;
        case STORE:
            for (int64_t i = 0; i < count; i++)
                warp.bulk = std::max(
                    warp.bulk, fetch(sm_number, names[2 * i + 1], t) + m.store_latency);
            return t;
        case STORE_COMMIT: warp.bulk_groups.push_back(warp.bulk); return t;
        case STORE_WAIT: return oldest(warp.bulk_groups, op.amount, t);
        case PRODUCT: product(w, names, count, t); return t;
        case COMMIT:
            for (int64_t i = 0; i < count; i++)
                events.push({std::max(t, warp.product) + m.commit_latency, 0, 1, names[2 * i], 1});
            return t;
        case WGMMA:
            in.busy[sm_number * UNITS + U_SMEM] += op.amount / m.smem_bytes;
            warp.wgmma = std::max(warp.wgmma, ended);
            return t;
        case WGMMA_COMMIT: warp.wgmma_groups.push_back(warp.wgmma); return t;
        case WGMMA_WAIT: return oldest(warp.wgmma_groups, op.amount, t);
        case COPY:
            sm.debt += op.amount;
            warp.copied = std::max(warp.copied, fetch(sm_number, op.amount, t) + m.tma_latency);
            return t;
        case COPY_COMMIT: warp.copy_groups.push_back(warp.copied); return t;
        case COPY_WAIT: return oldest(warp.copy_groups, op.amount, t);
        case COPY_ARRIVE:
            for (int64_t i = 0; i < count; i++)
                events.push({std::max(t, warp.copied), 0, 1, names[2 * i], names[2 * i + 1]});
            return t;
        default: written(warp, op, ended); return t;
        }
    }

    // The time at which an SM's share of the L2 cache has delivered so many bytes.
    double fetch(int sm, double bytes, double t) {
        double start = std::max(t, sms[sm].l2);
        sms[sm].l2 = start + bytes / m.l2_bytes;
        unit(sm, U_L2, start, sms[sm].l2);
        return sms[sm].l2;
    }

    // When all but the newest `keep` groups are over.
    double oldest(const std::vector<double>& groups, double keep, double t) {
        int64_t last = static_cast<int64_t>(groups.size()) - static_cast<int64_t>(keep);
        for (int64_t i = 0; i < last; i++) t = std::max(t, groups[i]);
        return t;
    }

    // names: a barrier and its parity, + 2 if the emulated test failed.
    double wait(int w, const Op& op, const int32_t* names, int64_t count, double t) {
        for (int64_t i = 0; i < count; i++) {
            Barrier& b = barriers[names[2 * i]];
            int parity = names[2 * i + 1] & 1;
            bool failed = names[2 * i + 1] & 2;
            if ((b.phase & 1) == parity && (op.blocking || !failed)) {
                b.waiters.push_back({w, parity});
                return -1;
            }
        }
        return t + m.sync_latency;
    }

    double named_barrier(int w, const Op& op, const int32_t* names, double t) {
        Group& g = named[16 * in.warp_cta[w] + names[0]];
        g.threads += 32;
        bool complete = g.threads >= names[1];
        if (complete) release(g, t);
        if (op.kind == NAMED_ARRIVE) return t;
        if (complete) return t + m.sync_latency;
        g.waiters.push_back(w);
        return -1;
    }

    void release(Group& g, double t) {
        g.threads = 0;
        g.phase++;
        for (int w : g.waiters) go_on(w, t + m.sync_latency);
        g.waiters.clear();
    }

    // names: (rows, columns), (CTAs, 1 if A is in tensor memory), for each product.
    void product(int w, const int32_t* names, int64_t count, double t) {
        int cta = in.warp_cta[w];
        for (int64_t i = 0; i + 1 < count; i += 2) {
            double rows = names[2 * i], columns = names[2 * i + 1], group = names[2 * i + 2];
            bool in_tmem = names[2 * i + 3];
            int ctas[2] = {cta, in.cta_peer[cta]};
            double start = t, cycles = 2 * rows * columns * 16 / m.tensor_flops;
            double bytes = 32 * ((in_tmem ? 0 : rows) + columns / group);
            for (int k = 0; k < group; k++) start = std::max(start, sms[in.cta_sm[ctas[k]]].tensor);
            double longest = cycles;
            for (int k = 0; k < group; k++) {
                Sm& sm = sms[in.cta_sm[ctas[k]]];
                longest = std::max(longest, (bytes + sm.debt) / m.smem_bytes);
                sm.debt = std::max(0.0, sm.debt - std::max(0.0, longest * m.smem_bytes - bytes));
            }
            for (int k = 0; k < group; k++) {
                int number = in.cta_sm[ctas[k]];
                sms[number].tensor = start + longest;
                in.busy[number * UNITS + U_SMEM] += bytes / m.smem_bytes;
                unit(number, U_TENSOR, start, start + longest);
            }
            warps[w].product = start + longest + m.mma_latency;
        }
    }
};

}  // namespace

// 0 if all warps ended, else 1: then warp_end keeps -1 for those that still wait.
extern "C" int replay(const Input* input, const Machine* machine, int64_t* stuck_at) {
    for (int w = 0; w < input->num_warps; w++) input->warp_end[w] = -1;
    Replay replay(*input, *machine);
    bool done = replay.run();
    for (int w = 0; w < input->num_warps; w++) stuck_at[w] = replay.warps[w].at;
    return done ? 0 : 1;
}
