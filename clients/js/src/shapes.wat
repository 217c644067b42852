;; sums[n] = the dot product of `width` signed bytes at shapes + n width with the 16-bit factors, for `count` numbers.
;; `width` is a multiple of 8.  Sums are below 2^31 for up to 512 shapes: 512 * 128 * 32767.
(module
  (memory (export "memory") 0)
  (func (export "dot") (param $shapes i32) (param $factors i32) (param $width i32) (param $sums i32) (param $count i32)
    (local $k i32) (local $sum v128)
    (loop $numbers
      (local.set $sum (v128.const i32x4 0 0 0 0))
      (local.set $k (i32.const 0))
      (loop $eights
        (local.set $sum
          (i32x4.add
            (local.get $sum)
            (i32x4.dot_i16x8_s
              (v128.load8x8_s (i32.add (local.get $shapes) (local.get $k)))
              (v128.load (i32.add (local.get $factors) (i32.shl (local.get $k) (i32.const 1)))))))
        (local.set $k (i32.add (local.get $k) (i32.const 8)))
        (br_if $eights (i32.lt_u (local.get $k) (local.get $width))))
      (i32.store
        (local.get $sums)
        (i32.add
          (i32.add (i32x4.extract_lane 0 (local.get $sum)) (i32x4.extract_lane 1 (local.get $sum)))
          (i32.add (i32x4.extract_lane 2 (local.get $sum)) (i32x4.extract_lane 3 (local.get $sum)))))
      (local.set $shapes (i32.add (local.get $shapes) (local.get $width)))
      (local.set $sums (i32.add (local.get $sums) (i32.const 4)))
      (local.set $count (i32.sub (local.get $count) (i32.const 1)))
      (br_if $numbers (local.get $count)))))
