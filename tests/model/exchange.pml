/* The exchange protocol of docs/protocol.md: numbered exchanges over lanes, counted immediates, the window of
 * halves, notices. Every rank runs a program of its own choice (any interleaving of sends and recvs that the window
 * allows); NICs deliver bytes, immediates and notices in any order and at any time; one rank may die or time out
 * anywhere. run.py says what is run and which rule each bug breaks.
 *
 * A rank's message to itself needs no network and is left out. Rows, headers and rounds are not modelled: a round
 * is an exchange, and C++ tests check the rest.
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef SHARDS    /* writes that a message of rank 0 is split into; those of other ranks are one: NICs differ */
#define SHARDS 1
#endif
#ifndef DEPTH
#define DEPTH 1
#endif
#ifndef LAST      /* exchanges a program has */
#define LAST 5
#endif
#ifndef FAULTS    /* ranks that die or time out, 0 or 1 */
#define FAULTS 0
#endif
/* For walks through a part of a space: what chance seldom brings is drawn at the start, namely how many exchanges come
 * before the fault, and whether local completions wait until all lanes have been used. */
#ifndef DRAWN
#define DRAWN 0
#endif
/* When bytes land: ANY time before their immediate (0), as they are posted (1), or with their immediate (2). Whatever
 * goes wrong the earlier they land (P1) goes wrong in 1, whatever the later (P2, P3) in 2: for large spaces. */
#ifndef TIMING
#define TIMING 0
#endif
#ifndef COMPLETIONS  /* local completions of sends are modelled */
#define COMPLETIONS 1
#endif
#ifndef SMALL_BUFFER /* a send buffer holds one message: an exchange drains it between its messages (P3) */
#define SMALL_BUFFER 0
#endif

/* Seeded bugs, each switched on by its name. */
#ifdef BUG_LANE_LESS
#define LANES (2 * DEPTH - 1)
#else
#define LANES (2 * DEPTH)
#endif
#ifdef BUG_WINDOW
#define WINDOW (DEPTH + 1)
#else
#define WINDOW DEPTH
#endif

/* By-number lanes; the bug gives dispatch and combine one each, whatever the program does with them. */
#ifdef BUG_REGIONS_BY_KIND
byte kinds;                       /* a bit an exchange: 0 dispatch, 1 combine */
byte lane_of[LAST], use_of[LAST];
#define LANE(q) lane_of[q]
#define USE(q) use_of[q]
#else
#define LANE(q) ((q) % LANES)
#define USE(q) ((q) / LANES)
#endif
#define USES LAST                 /* no lane is used more often */

#define ALL ((1 << LAST) - 1)
#define UPTO(q) ((1 << (q)) - 1)  /* exchanges before q, as bits */
#define SH(s) ((s) == 0 -> SHARDS : 1)
/* What a send buffer holds when the message to d of a lane's use u is packed; 0 before any. */
#if SMALL_BUFFER
#define CONTENT(u, d) ((u) * RANKS + (d) + 1)
#else
#define CONTENT(u, d) ((u) + 1)
#endif
#ifdef BUG_SHARDS_OF_THE_RECEIVER
#define EXPECTED(s, d) SH(d)
#else
#define EXPECTED(s, d) SH(s)
#endif

#define RUNNING 0
#define DONE 1
#define FAILED 2
#define DEAD 3
#define NOBODY 9

typedef Link {                    /* a shard of the messages from one rank to another, by lane */
  byte flying[LANES];             /* bits of uses: posted, not landed */
  byte landed[LANES];             /* landed, immediate not delivered */
  byte unread[LANES];             /* local completion not delivered: the NIC may read the send buffer */
  byte region[LANES];             /* what the receiver's region holds: use + 1 */
}
#define LINK(s, d, h) link[((s) * RANKS + (d)) * SHARDS + (h)]
Link link[RANKS * RANKS * SHARDS];

typedef Rank_ {
  byte state, culprit;
  byte next;                      /* number of the next exchange to send */
  byte received;                  /* bits of exchanges */
  byte buffer[LANES];             /* what the send buffer holds */
  byte count[LANES * RANKS];      /* immediates, by lane and source */
  byte notice[RANKS];             /* by source: 0 none, 1 + culprit under way */
}
Rank_ rank[RANKS];
byte faults = FAULTS;
#if DRAWN
byte before_fault, before_completions;
#define MAY_COMPLETE(s) (rank[s].next >= before_completions)
#define MAY_FAIL(r) (faults > 0 && rank[r].received >= UPTO(before_fault))
#else
#define MAY_COMPLETE(s) true
#define MAY_FAIL(r) (faults > 0)
#endif

/* ---- NICs ---- */

/* P1: what was there has been read. P3: the NIC reads what was packed. */
#define LAND(l, u) \
  assert(was_read(d, l, u)); \
  assert(!COMPLETIONS || !(LINK(s, d, h).unread[l] & (1 << u)) || rank[s].buffer[l] == CONTENT(u, d)); \
  LINK(s, d, h).region[l] = u + 1
/* P2: counted for its own exchange. */
#define COUNT(l, u) \
  assert(rank[d].count[l * RANKS + s] >= u * SH(s) && rank[d].count[l * RANKS + s] < (u + 1) * SH(s)); \
  rank[d].count[l * RANKS + s]++
#define CLEAR(field, l, u) LINK(s, d, h).field[l] = LINK(s, d, h).field[l] & ~(1 << u)
/* What comes to a rank that has failed is for nobody: generations.pml. */
#define READS(d) (rank[d].state == RUNNING || rank[d].state == DONE)

#if TIMING == 0
#define ARRIVE(l, u) \
  :: d_step { (LINK(s, d, h).flying[l] & (1 << u)) -> CLEAR(flying, l, u); \
       if \
       :: READS(d) -> LAND(l, u); LINK(s, d, h).landed[l] = LINK(s, d, h).landed[l] | (1 << u) \
       :: else \
       fi } \
  :: d_step { (LINK(s, d, h).landed[l] & (1 << u)) -> CLEAR(landed, l, u); COUNT(l, u) }
#elif TIMING == 1
#define ARRIVE(l, u) :: d_step { (LINK(s, d, h).flying[l] & (1 << u)) -> CLEAR(flying, l, u); COUNT(l, u) }
#else
#define ARRIVE(l, u) \
  :: d_step { (LINK(s, d, h).flying[l] & (1 << u)) -> CLEAR(flying, l, u); \
       if \
       :: READS(d) -> LAND(l, u); COUNT(l, u) \
       :: else \
       fi }
#endif
#if COMPLETIONS
/* P3: until now the NIC might have sent the buffer once more. */
#define COMPLETE_LOCALLY(l, u) \
  :: d_step { MAY_COMPLETE(s) && (LINK(s, d, h).unread[l] & (1 << u)) -> assert(rank[s].buffer[l] == CONTENT(u, d)); CLEAR(unread, l, u) }
#else
#define COMPLETE_LOCALLY(l, u)
#endif
#if FAULTS
#define LOSE(l, u) \
  :: d_step { rank[s].state == DEAD && (LINK(s, d, h).flying[l] & (1 << u)) -> CLEAR(flying, l, u) }
#else
#define LOSE(l, u)
#endif
#define EVENTS(l, u) ARRIVE(l, u) COMPLETE_LOCALLY(l, u) LOSE(l, u)

#ifdef BUG_REGIONS_BY_KIND
#define was_read(d, l, u) (u == 0 || read_use(d, l, u - 1))
#define READ_AT(d, l, u, q) (lane_of[q] == l && use_of[q] == u && (rank[d].received & (1 << q)))
#define read_use(d, l, u) (READ_AT(d, l, u, 0) || READ_AT(d, l, u, 1) || READ_AT(d, l, u, 2) || \
                           READ_AT(d, l, u, 3))
#else
#define was_read(d, l, u) (u == 0 || (rank[d].received & (1 << ((u - 1) * LANES + l))))
#endif

#if defined(BUG_LANE_LESS) || defined(BUG_REGIONS_BY_KIND)
#define LANE_EVENTS(l) EVENTS(l, 0) EVENTS(l, 1) EVENTS(l, 2) EVENTS(l, 3) EVENTS(l, 4)
#elif DEPTH == 1
#define LANE_EVENTS(l) EVENTS(l, 0) EVENTS(l, 1) EVENTS(l, 2)
#else
#define LANE_EVENTS(l) EVENTS(l, 0) EVENTS(l, 1)
#endif

proctype Nic(byte s; byte d; byte h) {
end:
  do
  LANE_EVENTS(0)
#if LANES > 1
  LANE_EVENTS(1)
#endif
#if LANES > 2
  LANE_EVENTS(2)
#endif
#if LANES > 3
  LANE_EVENTS(3)
#endif
  od
}

/* ---- ranks ---- */

#define FULL(r, q, s) ((s) == r || rank[r].count[LANE(q) * RANKS + (s)] >= (USE(q) + 1) * EXPECTED(s, r))
#define SAME(r, q, s) \
  ((s) == r || (LINK(s, r, 0).region[LANE(q)] == USE(q) + 1 && LINK(s, r, SH(s) - 1).region[LANE(q)] == USE(q) + 1))
#define FREE(r, d) (!LINK(r, d, 0).unread[LANE(q)] && !LINK(r, d, SHARDS - 1).unread[LANE(q)])
#define GONE(s) (rank[s].state == DEAD)
#if RANKS == 2
#define COMPLETE(r, q) (FULL(r, q, 0) && FULL(r, q, 1))
#define INTACT(r, q) (SAME(r, q, 0) && SAME(r, q, 1))
#define BUFFER_FREE(r) (FREE(r, 0) && FREE(r, 1))
#define NOTICED(r) (rank[r].notice[0] || rank[r].notice[1])
#define A_DEATH (GONE(0) || GONE(1))
#define THE_DEAD (GONE(0) -> 0 : 1)
#define MISSING(r, q) (FULL(r, q, 0) -> 1 : 0)
#else
#define COMPLETE(r, q) (FULL(r, q, 0) && FULL(r, q, 1) && FULL(r, q, 2))
#define INTACT(r, q) (SAME(r, q, 0) && SAME(r, q, 1) && SAME(r, q, 2))
#define BUFFER_FREE(r) (FREE(r, 0) && FREE(r, 1) && FREE(r, 2))
#define NOTICED(r) (rank[r].notice[0] || rank[r].notice[1] || rank[r].notice[2])
#define A_DEATH (GONE(0) || GONE(1) || GONE(2))
#define THE_DEAD (GONE(0) -> 0 : (GONE(1) -> 1 : 2))
#define MISSING(r, q) (!FULL(r, q, 0) -> 0 : (!FULL(r, q, 1) -> 1 : 2))
#endif
#define NOTICE_OF(r) (rank[r].notice[0] -> rank[r].notice[0] : rank[r].notice[1])
#if RANKS == 3
#define CULPRIT(r) ((NOTICE_OF(r) -> NOTICE_OF(r) : rank[r].notice[2]) - 1)
#else
#define CULPRIT(r) (NOTICE_OF(r) - 1)
#endif

/* P22: final, and told to everybody once by whoever found it. */
inline fail(r, who) {
  d_step {
    rank[r].state = FAILED;
    rank[r].culprit = who;
#ifndef BUG_NO_NOTICE
    to = 0;
    do
    :: to < RANKS -> if :: to != r -> rank[to].notice[r] = who + 1 :: else fi; to++
    :: else -> break
    od;
    to = 0
#endif
  }
}

/* What may happen at any point of a program instead of its next step. */
#define FAULT \
  :: d_step { MAY_FAIL(r) -> faults--; rank[r].state = DEAD } -> goto out \
  :: d_step { NOTICED(r) -> rank[r].state = FAILED; rank[r].culprit = CULPRIT(r) } -> goto out \
  :: A_DEATH -> fail(r, THE_DEAD); goto out            /* P26: its heartbeats stop */

#define SEND_WINDOW(r) (rank[r].next < LAST && \
  (rank[r].next < WINDOW || (rank[r].received & UPTO(rank[r].next - WINDOW + 1)) == UPTO(rank[r].next - WINDOW + 1)))
/* An exchange that was sent and not received: at most WINDOW of them, any may be received next. */
#define OPEN(r, k) (rank[r].next > (k) && !(rank[r].received & (1 << (rank[r].next - 1 - (k)))))
#if WINDOW > 1
#define OPEN_1(r) OPEN(r, 1)
#else
#define OPEN_1(r) false
#endif
#if WINDOW > 2
#define OPEN_2(r) OPEN(r, 2)
#else
#define OPEN_2(r) false
#endif

/* The wait for local completions before a send buffer is packed. Its deadline names nobody (P25), and nothing is packed
 * after it: what it waited for may still be read. */
#if FAULTS && COMPLETIONS
#define SEND_TIMES_OUT \
  :: d_step { MAY_FAIL(r) && !BUFFER_FREE(r) -> faults-- } -> fail(r, NOBODY); AFTER_THE_TIMEOUT
#else
#define SEND_TIMES_OUT
#endif
#ifdef BUG_BUFFER_REUSED_AFTER_TIMEOUT
#define AFTER_THE_TIMEOUT skip
#else
#define AFTER_THE_TIMEOUT goto out
#endif

/* Packs lane LANE(q)'s send buffer with the message to one rank and posts it. */
inline post(r, to) {
  rank[r].buffer[LANE(q)] = CONTENT(USE(q), to);
  h = 0;
  do
  :: h < SH(r) ->
       LINK(r, to, h).flying[LANE(q)] = LINK(r, to, h).flying[LANE(q)] | (1 << USE(q));
#if TIMING == 1
       assert(!READS(to) || was_read(to, LANE(q), USE(q)));
       LINK(r, to, h).region[LANE(q)] = USE(q) + 1;
#endif
#if COMPLETIONS
       LINK(r, to, h).unread[LANE(q)] = LINK(r, to, h).unread[LANE(q)] | (1 << USE(q));
#endif
       h++
  :: else -> break
  od;
  h = 0
}

proctype Rank(byte r) {
  byte q, to, h;
#if SMALL_BUFFER   /* for 3 ranks: with 2 an exchange has one message */
  byte other;
#endif
  do
  :: rank[r].received == ALL -> d_step { rank[r].state = DONE } -> break
#if FAULTS
  FAULT
#endif
  :: SEND_WINDOW(r) ->
       q = rank[r].next;
       if
#ifdef BUG_BUFFER_REUSED_EARLY
       :: skip
#else
       :: (!COMPLETIONS || BUFFER_FREE(r))
#endif
#if FAULTS
       FAULT
       SEND_TIMES_OUT
#endif
       fi;
#if SMALL_BUFFER
       other = (r == 0 -> 1 : 0);
       d_step { post(r, other) };
       if
#ifdef BUG_FULL_BUFFER_NOT_DRAINED
       :: skip
#else
       :: BUFFER_FREE(r)
#endif
#if FAULTS
       FAULT
       SEND_TIMES_OUT
#endif
       fi;
       other = (r == 2 -> 1 : 2);
       d_step { post(r, other); rank[r].next++; other = 0; q = 0 }
#else
       d_step {
         rank[r].next++;
         to = 0;
         do
         :: to < RANKS ->
              if
              :: to != r -> post(r, to)
              :: else
              fi;
              to++
         :: else -> break
         od;
         to = 0; q = 0
       }
#endif
#ifdef BUG_BUFFER_REUSED_AFTER_TIMEOUT
       if
       :: rank[r].state == FAILED -> goto out
       :: else
       fi
#endif
  :: OPEN(r, 0) || OPEN_1(r) || OPEN_2(r) ->
       if
       :: OPEN(r, 0) -> q = rank[r].next - 1
#if WINDOW > 1
       :: OPEN_1(r) -> q = rank[r].next - 2
#endif
#if WINDOW > 2
       :: OPEN_2(r) -> q = rank[r].next - 3
#endif
       fi;
       if
       :: COMPLETE(r, q)
#if FAULTS
       FAULT
       :: d_step { MAY_FAIL(r) && !COMPLETE(r, q) -> faults-- } -> fail(r, MISSING(r, q)); goto out   /* P25 */
#endif
       fi;
       assert(INTACT(r, q));      /* P2: complete means that the bytes are here; */
       d_step {
         assert(INTACT(r, q));    /* P1: and they stay while they are being read */
         rank[r].received = rank[r].received | (1 << q);
         q = 0
       }
  od;
out:
  skip
}

/* When all have come to an end. */
#if RANKS == 2
#define ENDED (rank[0].state != RUNNING && rank[1].state != RUNNING)
#else
#define ENDED (rank[0].state != RUNNING && rank[1].state != RUNNING && rank[2].state != RUNNING)
#endif

proctype Verdict() {
  byte a, b, l, u;
end:
  ENDED ->
  d_step {
#if FAULTS
    /* P22: whoever failed names the same rank. */
    a = 0;
    do
    :: a < RANKS ->
         b = 0;
         do
         :: b < RANKS ->
              assert(rank[a].state != FAILED || rank[b].state != FAILED || rank[a].culprit == rank[b].culprit);
              b++
         :: else -> break
         od;
         a++
    :: else -> break
    od
#else
    /* P2: none lost, none twice. */
    a = 0;
    do
    :: a < RANKS ->
         b = 0;
         do
         :: b < RANKS ->
              l = 0;
              u = 0;
              do
              :: l < LANES -> u = u + rank[a].count[l * RANKS + b]; l++
              :: else -> break
              od;
              assert(a == b || u == LAST * SH(b));
              b++
         :: else -> break
         od;
         a++
    :: else -> break
    od
#endif
  }
}

init {
  byte a, b, c;
  atomic {
#if DRAWN
    if
    :: before_fault = 0
    :: before_fault = LAST / 2
    :: before_fault = LAST - 1
    fi;
#if !SMALL_BUFFER
    if
    :: before_completions = LANES
    :: before_completions = 0
    fi;
#endif
#endif
#ifdef BUG_REGIONS_BY_KIND
    byte q, k0, k1;
    select(kinds : 0 .. 31);
    q = 0;
    do
    :: q < LAST ->
         if
         :: kinds & (1 << q) -> lane_of[q] = 1; use_of[q] = k1; k1++
         :: else -> lane_of[q] = 0; use_of[q] = k0; k0++
         fi;
         q++
    :: else -> break
    od;
#endif
    a = 0;
    do
    :: a < RANKS ->
         rank[a].culprit = NOBODY;
         b = 0;
         do
         :: b < RANKS ->
              c = 0;
              do
              :: a != b && c < SH(a) -> run Nic(a, b, c); c++
              :: else -> break
              od;
              b++
         :: else -> break
         od;
         run Rank(a);
         a++
    :: else -> break
    od;
    run Verdict()
  }
}
